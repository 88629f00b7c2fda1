"""How far apart a model's experts are, and how its routers choose: that there is something to quantise and to misroute.

Legend: E experts, P numbers of one expert, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.layer import MoELayer, moe_layers
from moe.models.evaluate import perplexity
from moe.types import Routing


@dataclass(frozen=True, kw_only=True)
class Description:
    """Means over layers, on held-out text.

    Attributes:
        perplexity: of the model.
        expert_distance: mean over pairs of experts of 1 - cosine of all their weights.
        output_distance: mean over pairs of 1 - cosine of their outputs for the same input, the layer's own.
        entropy: of a token's expert probabilities (sigmoid scores over their sum), over log E: 1 says that all are alike.
        load_least, load_most: of the experts' tokens, the least and the most, over the mean.
        params: in millions.
    """

    perplexity: float
    expert_distance: float
    output_distance: float
    entropy: float
    load_least: float
    load_most: float
    params: float


@torch.no_grad()
def describe(model: nn.Module, windows_BL: Tensor) -> Description:
    """Run the model, an `MoEForCausalLM` in eval mode, on the text."""
    layers = list(moe_layers(model).values())
    seen: list[dict[str, Any]] = [{} for _ in layers]

    def recorder(index: int) -> Any:
        def record(_: nn.Module, args: tuple[Tensor, ...], routing: Routing) -> None:
            assert routing.probs_TE is not None
            found = seen[index]
            found["counts_E"] = found.get("counts_E", 0) + routing.counts_E
            probs_TE = routing.probs_TE.float()
            entropy_T = -(probs_TE * probs_TE.clamp_min(1e-30).log()).sum(-1)
            found.setdefault("entropy", []).append(entropy_T)
            found.setdefault("x_TD", args[0].float()[:64])  # enough to compare outputs

        return record

    hooks = [layer.router.register_forward_hook(recorder(index)) for index, layer in enumerate(layers)]
    try:
        found_perplexity = perplexity(model, windows_BL, batch_size=1)["perplexity"]
    finally:
        for hook in hooks:
            hook.remove()
    load_E = [found["counts_E"] / found["counts_E"].float().mean() for found in seen]
    return Description(
        perplexity=found_perplexity,
        expert_distance=_mean([_weights_apart(layer) for layer in layers]),
        output_distance=_mean(
            [_outputs_apart(layer, found["x_TD"]) for layer, found in zip(layers, seen, strict=True)]
        ),
        entropy=_mean(
            [
                torch.cat(found["entropy"]).mean() / torch.tensor(float(layer.num_experts)).log()
                for layer, found in zip(layers, seen, strict=True)
            ]
        ),
        load_least=_mean([each_E.min() for each_E in load_E]),
        load_most=_mean([each_E.max() for each_E in load_E]),
        params=sum(p.numel() for p in model.parameters()) / 1e6,
    )


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack([value.float() for value in values]).mean())


def apart(rows_EP: Tensor) -> Tensor:
    """() mean over pairs of 1 - cosine."""
    unit_EP = nn.functional.normalize(rows_EP.float(), dim=-1)
    cosines_EE = unit_EP @ unit_EP.T
    pairs = torch.triu_indices(len(rows_EP), len(rows_EP), offset=1)
    return 1 - cosines_EE[pairs[0], pairs[1]].mean()


def _weights_apart(layer: MoELayer) -> Tensor:
    bank = layer.experts
    return apart(torch.cat([bank.gate_up_proj.flatten(1), bank.down_proj.flatten(1)], dim=-1))


def _outputs_apart(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """All experts on the same tokens."""
    num_tokens, num_experts = len(x_TD), layer.num_experts
    outputs = []
    for expert in range(num_experts):
        routing = Routing(
            num_tokens=num_tokens,
            num_experts=num_experts,
            token_ids_N=torch.arange(num_tokens),
            expert_ids_N=torch.full((num_tokens,), expert),
            weights_N=torch.ones(num_tokens),
            counts_E=torch.zeros(num_experts, dtype=torch.int64).index_fill_(0, torch.tensor([expert]), num_tokens),
            top_k=1,
        )
        outputs.append(layer.experts(x_TD, routing).float())
    return torch.stack([apart(torch.stack([out[t] for out in outputs])) for t in range(num_tokens)]).mean()
