"""A quantised model against the model that it was made of: perplexity, KL, most likely tokens and chosen experts.

Both run in fp32 on the same held-out windows; the reference runs once for all cells, and its logits go to a file.

Legend: B windows, L window length, T = L, K experts per token.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.layer import MoELayer, moe_layers
from moe.models.compare import LogitsFile, compare_logits, load_folder, model_logits
from moe.models.evaluate import perplexity_of
from moe.types import Routing


@dataclass(frozen=True, kw_only=True)
class Quality:
    """On one text.

    Attributes:
        perplexity: of the quantised model.
        of_reference: it over the reference's.
        kl: mean over tokens of KL(reference || quantised), nats.
        same_top1: share of tokens with the same most likely next token.
        same_experts: mean over layers and tokens of the share of a token's K experts that the reference chose as well.
        same_set: share of layers and tokens for which all K are.
        finite: whether all logits are.
    """

    perplexity: float
    of_reference: float
    kl: float
    same_top1: float
    same_experts: float
    same_set: float
    finite: bool


class ChosenExperts:
    """Records which experts every MoE layer of a model chooses, while it is entered.

    Attributes:
        by_layer: (T, K) int64 ids in rising order, of each layer, all windows one after the other.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[MoELayer] = list(moe_layers(model).values())
        self._parts: list[list[Tensor]] = [[] for _ in self._layers]

    @property
    def by_layer(self) -> list[Tensor]:
        """See the class."""
        return [torch.cat(parts) for parts in self._parts]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside."""
        hooks = [layer.router.register_forward_hook(self._recorder(index)) for index, layer in enumerate(self._layers)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _recorder(self, index: int) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], routing: Routing) -> None:
            assert routing.top_k is not None, "both models choose K experts per token"
            chosen_TK = routing.expert_ids_N.view(routing.num_tokens, routing.top_k)
            self._parts[index].append(chosen_TK.sort(-1).values)

        return record


def overlap(first: list[Tensor], second: list[Tensor]) -> tuple[float, float]:
    """``same_experts`` and ``same_set`` of two `ChosenExperts.by_layer`."""
    shares, sets = [], []
    for a_TK, b_TK in zip(first, second, strict=True):
        hits_T = (a_TK[:, :, None] == b_TK[:, None, :]).any(-1).sum(-1)
        shares.append(hits_T.float().mean() / a_TK.shape[1])
        sets.append((hits_T == a_TK.shape[1]).float().mean())
    return float(torch.stack(shares).mean()), float(torch.stack(sets).mean())


class Reference:
    """The model before quantisation, on held-out windows.

    Args:
        folder: of the model.
        windows_BL: held-out text.
        scratch: folder for its logits, ``B * L * V * 4`` bytes.

    Attributes:
        perplexity: on the text.
    """

    def __init__(self, folder: Path, windows_BL: Tensor, scratch: Path) -> None:
        self.windows_BL = windows_BL
        self._logits = LogitsFile(scratch / "reference.logits", len(windows_BL))
        model = load_folder(folder, torch.float32)
        experts = ChosenExperts(model)
        with experts.recording():
            self._logits.write(model_logits(model, windows_BL))
        self._chosen = experts.by_layer
        total = 0.0
        for ids_L, logits_LV in zip(windows_BL, self._logits.windows(windows_BL.shape[1]), strict=True):
            total += nn.functional.cross_entropy(logits_LV[:-1], ids_L[1:], reduction="sum").item()
        self.perplexity = perplexity_of(total / (windows_BL.numel() - len(windows_BL)))

    def compare(self, model: nn.Module) -> Quality:
        """Run a quantised model, in eval mode, on the same text."""
        experts = ChosenExperts(model)
        with experts.recording():
            found = compare_logits(
                self._logits.windows(self.windows_BL.shape[1]), model_logits(model, self.windows_BL), self.windows_BL
            )
        same_experts, same_set = overlap(self._chosen, experts.by_layer)
        finite = math.isfinite(found.max_diff) and math.isfinite(found.other_loss)
        perplexity = perplexity_of(found.other_loss) if finite else math.nan
        return Quality(
            perplexity=perplexity,
            of_reference=perplexity / self.perplexity,
            kl=found.kl,
            same_top1=found.same_top1,
            same_experts=same_experts,
            same_set=same_set,
            finite=finite,
        )
