"""The exchange by DeepEP, NVIDIA GPUs only: its kernels move tokens over NVLink and RDMA, once per rank and node.

github.com/deepseek-ai/DeepEP, version 2 (`ElasticBuffer`). **Written from its source and documentation; this project has
never run it**: where it was developed there is neither the package nor a machine with several GPUs. It runs only when
asked for.

DeepEP moves bf16 only, takes at most 32 experts per token, and its kernels decide about nodes and chunks; the exchange's
other options do not apply.

Legend: T tokens, D model, N assignments, K most experts of a token, R received rows.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from moe.experts import ExpertBank
from moe.parallel.collectives import Group
from moe.parallel.exchange.config import ExchangeConfig
from moe.types import Routing

_INSTALL = "install it from github.com/deepseek-ai/DeepEP, or set parallel.exchange.backend=torch"


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A dispatched batch: DeepEP's buffer, and its handle, which knows the way back and the same way again."""

    buffer: Any
    handle: Any


class DeepEPExchange:
    """As `moe.parallel.exchange.expert_parallel.ExpertParallelExchange`, over DeepEP.

    Raises:
        ValueError: the package is not installed, or there is no GPU.
    """

    def __init__(self, group: Group, rank: int, num_ranks: int, config: ExchangeConfig, layer: str) -> None:
        if importlib.util.find_spec("deep_ep") is None:
            raise ValueError(f"parallel.exchange.backend='deepep' needs the package deep_ep; {_INSTALL}")
        if not torch.cuda.is_available():
            raise ValueError("parallel.exchange.backend='deepep' needs GPUs; set parallel.exchange.backend=torch")
        self._group, self._num_ranks = group or dist.group.WORLD, num_ranks
        self._buffer: Any = None
        self._room = (0, 0)  # tokens and experts per token that the buffer was made for

    @torch.compiler.disable
    def __call__(
        self,
        x_TD: Tensor,
        routing: Routing,
        experts: ExpertBank,
        meanwhile: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Weighted sum of each token's experts wherever they live: (T, D) -> (T, D)."""
        ids_TK, weights_TK = _table(routing)
        largest_2 = torch.tensor(ids_TK.shape, device=x_TD.device)
        dist.all_reduce(largest_2, dist.ReduceOp.MAX, group=self._group)  # DeepEP wants one size on all ranks
        max_tokens, top_k = largest_2.tolist()
        buffer = self._buffer_for(max_tokens, top_k, x_TD.shape[1])
        ids_TK = pad(ids_TK, (0, top_k - ids_TK.shape[1]), value=-1)
        weights_TK = pad(weights_TK, (0, top_k - weights_TK.shape[1]))
        found: list[Any] = []
        x_RD, weights_RK = _Dispatch.apply(
            x_TD.bfloat16(), weights_TK, ids_TK, buffer, self._room[0], routing.num_experts, found
        )
        ids_RK, handle = found
        if meanwhile is not None:
            meanwhile()
        row_ids_N, choices_N = (ids_RK >= 0).nonzero(as_tuple=True)
        expert_ids_N = ids_RK[row_ids_N, choices_N].long()
        num_local = routing.num_experts // self._num_ranks
        local = Routing(
            num_tokens=x_RD.shape[0],
            num_experts=num_local,
            token_ids_N=row_ids_N,
            expert_ids_N=expert_ids_N,
            weights_N=weights_RK[row_ids_N, choices_N],
            counts_E=torch.bincount(expert_ids_N, minlength=num_local),
        )
        y_RD = experts(x_RD, local)
        return _Combine.apply(y_RD.bfloat16(), _Sent(buffer=buffer, handle=handle)).to(x_TD.dtype)

    def _buffer_for(self, num_tokens: int, top_k: int, dim: int) -> Any:
        import deep_ep

        room = (max(num_tokens, self._room[0], 1), max(top_k, self._room[1], 1))
        if self._buffer is None or room != self._room:
            self._buffer = deep_ep.ElasticBuffer(
                self._group, num_max_tokens_per_rank=room[0], hidden=dim, num_topk=room[1]
            )
            self._room = room
        return self._buffer


def _table(routing: Routing) -> tuple[Tensor, Tensor]:
    """(T, K) expert ids with -1 where a token has fewer, and their weights with gradient."""
    token_ids_N, order_N = routing.token_ids_N.sort(stable=True)
    counts_T = torch.bincount(token_ids_N, minlength=routing.num_tokens)
    first_T = counts_T.cumsum(0) - counts_T
    places_N = torch.arange(len(order_N), device=order_N.device) - first_T[token_ids_N]
    top_k = int(counts_T.max()) if counts_T.numel() else 0
    ids_TK = torch.full((routing.num_tokens, top_k), -1, device=order_N.device)
    weights_TK = torch.zeros(ids_TK.shape, device=order_N.device)
    ids_TK = ids_TK.index_put((token_ids_N, places_N), routing.expert_ids_N[order_N])
    return ids_TK, weights_TK.index_put((token_ids_N, places_N), routing.weights_N[order_N])


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        ids_TK: Tensor,
        buffer: Any,
        max_tokens: int,
        num_experts: int,
        found: list[Any],
    ) -> tuple[Tensor, Tensor]:
        x_RD, ids_RK, weights_RK, handle, _ = buffer.dispatch(
            x_TD,
            topk_idx=ids_TK,
            topk_weights=weights_TK,
            num_experts=num_experts,
            num_max_tokens_per_rank=max_tokens,
        )
        ctx.buffer, ctx.handle = buffer, handle
        found += [ids_RK, handle]
        return x_RD, weights_RK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_RD: Tensor, dweights_RK: Tensor) -> tuple[Tensor | None, ...]:
        dx_TD, dweights_TK, _ = ctx.buffer.combine(
            dx_RD.contiguous(), handle=ctx.handle, topk_weights=dweights_RK.contiguous()
        )
        return dx_TD, dweights_TK, *[None] * 5


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, sent: _Sent) -> Tensor:
        ctx.sent = sent
        y_TD, _, _ = sent.buffer.combine(y_RD, handle=sent.handle)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        dy_RD, _, _, _, _ = ctx.sent.buffer.dispatch(dy_TD.contiguous(), handle=ctx.sent.handle)
        return dy_RD, None
