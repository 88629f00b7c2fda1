"""A copy of a model in which two routed experts of every layer get almost no tokens, as if calibration text missed them.

Their selection bias is lowered until the router sends them less than 1 % of the text's tokens. Weights stay as they are, so the
model's own bias can be put back after quantisation.

Legend: T tokens, E routed experts, K experts per token.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quantize.cells import FEW_TOKENS
from moe.layer import moe_layers
from moe.models.compare import load_folder
from moe.models.config import MoEConfig
from moe.models.folder import FolderWriter, ModelFolder
from moe.models.stock.ours import OURS

NUM_STARVED = 2


@torch.no_grad()
def write_starved(source: Path, out: Path, windows_BL: Tensor) -> float:
    """Write the copy; the largest share of the text's tokens that a starved expert gets, over layers.

    Raises:
        ValueError: a router without a selection bias.
    """
    model = load_folder(source, torch.float32)
    shares: list[float] = []
    for name, layer in moe_layers(model).items():
        if not hasattr(layer.router, "bias_E"):
            raise ValueError(f"{name} has no selection bias to lower; starve a model with a sigmoid router")
        layer.router.register_forward_pre_hook(_starver(shares.append))
    model.model(input_ids=windows_BL, use_cache=False)
    assert max(shares) < FEW_TOKENS, f"a starved expert gets {max(shares):.2%} of the tokens"
    biases = selection_biases(model)
    folder = ModelFolder(source)
    config = folder.config
    assert isinstance(config, MoEConfig)
    with FolderWriter(out) as writer:
        for name in folder.names:
            writer.add(name, biases.get(name, folder.read(name)))
        writer.finish(OURS.to_stock(config), folder.sidecars(), {})
    return max(shares)


def selection_biases(model: nn.Module) -> dict[str, Tensor]:
    """(E,) each, by tensor name."""
    return {f"{name}.router.bias_E": layer.router.get_buffer("bias_E") for name, layer in moe_layers(model).items()}


def restore_routing(model: nn.Module, source: Path) -> None:
    """Give a model the selection biases of the folder."""
    folder = ModelFolder(source)
    for name, bias_E in selection_biases(model).items():
        bias_E.copy_(folder.read(name))


def _starver(report: Callable[[float], None]) -> Any:
    """Lowers the bias of the two experts with the fewest tokens when the text arrives, the layers below being done."""

    def lower(router: Any, args: tuple[Any, ...]) -> None:
        scores_TE, bias_E = router.logits(args[0].float()).sigmoid(), router.bias_E
        top_k = router.config.top_k

        def chosen_TE() -> Tensor:
            ids_TK = (scores_TE + bias_E).topk(top_k).indices
            return torch.zeros_like(scores_TE).scatter_(1, ids_TK, 1.0)

        victims = chosen_TE().sum(0).argsort()[:NUM_STARVED]
        others_TE = (scores_TE + bias_E).index_fill(1, victims, -torch.inf)
        if others_TE.shape[1] - NUM_STARVED < top_k:
            raise ValueError(f"{top_k} of {others_TE.shape[1]} experts run: {NUM_STARVED} of them cannot be starved")
        last_T = others_TE.topk(top_k).values[:, -1]
        for expert in victims.tolist():
            # It is chosen where its score beats the K-th best of the others: below half of the limit.
            margin_T = scores_TE[:, expert] + bias_E[expert] - last_T
            bias_E[expert] -= margin_T.quantile(1 - FEW_TOKENS / 2).clamp_min(0)
        report(float(chosen_TE()[:, victims].mean(0).max()))

    return lower
