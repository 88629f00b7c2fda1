"""The top-k router after its projection as `torch.library` custom ops, so that autograd and ``torch.compile`` see one op each way.

Saved for backward: the logits, the chosen ids, and the padding mask.

Legend: T tokens, E experts, K top-k, P programs.
"""

import torch
import triton
from torch import Tensor

from moe.kernels import triton_router as router
from moe.types import RouterStats, TopKChoices, TopKRule


@torch.library.custom_op("moe::route_topk", mutates_args=())
def _forward(
    logits_TE: Tensor, bias_E: Tensor | None, keep_T: Tensor | None, top_k: int, sigmoid: bool, after: bool,
    renormalize: bool, scale: float, num_groups: int, top_k_groups: int,
) -> list[Tensor]:  # fmt: skip
    """Weights and ids (T, K), counts of all and of kept tokens, sum of probabilities, z, entropy and norm, number kept."""
    num_tokens, num_experts = logits_TE.shape
    sizes = router.blocks(num_experts, num_groups, top_k)
    num_tiles = triton.cdiv(triton.cdiv(num_tokens, sizes["ROWS"]), router.MOST_PROGRAMS)
    num_programs = triton.cdiv(num_tokens, max(sizes["ROWS"] * num_tiles, 1))

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits_TE.device)

    def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_TE.device)

    weights_TK, ids_TK = floats(num_tokens, top_k), ints(num_tokens, top_k)
    prob_PE, sums_P4 = floats(num_programs, num_experts), floats(num_programs, 4)
    count_PE = ints(num_programs, num_experts, dtype=torch.int32)
    kept_PE = None if keep_T is None else torch.empty_like(count_PE)
    counts_E, kept_counts_E, num_kept = ints(num_experts), ints(num_experts), ints()
    prob_sum_E, z, entropy, norm = floats(num_experts), floats(), floats(), floats()
    with torch.cuda.device_of(logits_TE):
        if num_programs:
            router.route_kernel[(num_programs,)](
                logits_TE, bias_E, keep_T, weights_TK, ids_TK, prob_PE, count_PE, kept_PE, sums_P4,
                num_tokens, num_experts, num_tiles, scale,
                K=top_k, SIGMOID=sigmoid, AFTER=after, RENORMALIZE=renormalize, BIASED=bias_E is not None,
                MASKED=keep_T is not None, NUM_GROUPS=num_groups, TOP_GROUPS=top_k_groups,
                SUM_OF_TWO=bias_E is not None and num_experts > num_groups, **sizes,
            )  # fmt: skip
        router.reduce_kernel[(triton.cdiv(num_experts, 32),)](
            prob_PE, count_PE, kept_PE, sums_P4, prob_sum_E, counts_E, kept_counts_E, z, entropy, norm, num_kept,
            num_programs, num_experts, MASKED=keep_T is not None, BLOCK_P=64, BLOCK_E=32,
        )  # fmt: skip
    return [weights_TK, ids_TK, counts_E, kept_counts_E, prob_sum_E, z, entropy, norm, num_kept]


@_forward.register_fake
def _(
    logits_TE: Tensor, bias_E: Tensor | None, keep_T: Tensor | None, top_k: int, sigmoid: bool, after: bool,
    renormalize: bool, scale: float, num_groups: int, top_k_groups: int,
) -> list[Tensor]:  # fmt: skip
    num_tokens, num_experts = logits_TE.shape

    def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits_TE.new_empty(shape, dtype=dtype)

    counts = [fresh(num_experts, dtype=torch.int64) for _ in range(2)]
    numbers = [fresh(), fresh(), fresh(), fresh(dtype=torch.int64)]
    choices = [fresh(num_tokens, top_k), fresh(num_tokens, top_k, dtype=torch.int64)]
    return [*choices, *counts, fresh(num_experts), *numbers]


@torch.library.custom_op("moe::route_topk_backward", mutates_args=())
def _backward(
    dweights_TK: Tensor, dprob_sum_E: Tensor, dz: Tensor, logits_TE: Tensor, keep_T: Tensor | None, ids_TK: Tensor,
    sigmoid: bool, after: bool, renormalize: bool, scale: float,
) -> Tensor:  # fmt: skip
    """dlogits (T, E)."""
    (num_tokens, num_experts), top_k = logits_TE.shape, ids_TK.shape[1]
    sizes = router.blocks(num_experts, 1, top_k)
    del sizes["GROUPS"]
    dlogits_TE = torch.empty_like(logits_TE)
    with torch.cuda.device_of(logits_TE):
        if num_tokens:
            router.route_backward_kernel[(triton.cdiv(num_tokens, sizes["ROWS"]),)](
                dweights_TK, dprob_sum_E, dz, logits_TE, keep_T, ids_TK, dlogits_TE, num_tokens, num_experts, scale,
                K=top_k, SIGMOID=sigmoid, AFTER=after, RENORMALIZE=renormalize, MASKED=keep_T is not None, **sizes,
            )  # fmt: skip
    return dlogits_TE


@_backward.register_fake
def _(
    dweights_TK: Tensor, dprob_sum_E: Tensor, dz: Tensor, logits_TE: Tensor, keep_T: Tensor | None, ids_TK: Tensor,
    sigmoid: bool, after: bool, renormalize: bool, scale: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits_TE)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits_TE, _, keep_T, _, *ctx.rule = inputs[:8]
    ctx.save_for_backward(logits_TE, keep_T, output[1])


def _autograd(ctx, gradients):  # type: ignore[no-untyped-def]
    logits_TE, keep_T, ids_TK = ctx.saved_tensors
    dweights_TK, dprob_sum_E, dz = (gradients[n].contiguous() for n in (0, 4, 5))
    return _backward(dweights_TK, dprob_sum_E, dz, logits_TE, keep_T, ids_TK, *ctx.rule), *[None] * 9


torch.library.register_autograd("moe::route_topk", _autograd, setup_context=_setup_context)


def route_topk(
    logits_TE: Tensor, rule: TopKRule, bias_E: Tensor | None = None, keep_T: Tensor | None = None
) -> TopKChoices:
    """See `ops.route_topk`."""
    weights_TK, ids_TK, counts_E, kept_counts_E, prob_sum_E, z, entropy, norm, num_kept = _forward(
        logits_TE.contiguous(),
        None if bias_E is None else bias_E.detach().float().contiguous(),
        None if keep_T is None else keep_T.contiguous(),
        rule.top_k,
        rule.score == "sigmoid",
        rule.score == "softmax" and rule.softmax_order == "after",
        rule.renormalize,
        rule.route_scale,
        rule.num_groups,
        rule.top_k_groups,
    )
    stats = RouterStats(
        num_kept=num_kept,
        counts_E=kept_counts_E,
        prob_sum_E=prob_sum_E,
        z_sum=z,
        entropy_sum=entropy.detach(),
        logit_norm_sum=norm.detach(),
    )
    return TopKChoices(expert_ids_TK=ids_TK, weights_TK=weights_TK, counts_E=counts_E, stats=stats)
