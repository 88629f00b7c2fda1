"""Trains ToMoE's masks and routers against the frozen dense model (arXiv 2501.15316).

A step is two forwards of the model and one backward through its activations; weights get no gradient.

Legend: B windows, L window length or layers, E experts, F neurons, D model, T tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.convert.distill import distillation
from moe.convert.tomoe import losses
from moe.convert.tomoe.gates import GatedModel
from moe.convert.tomoe.hypernet import HyperNetwork, hard_masks, sample_masks
from moe.convert.tomoe.options import ToMoEOptions

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class TrainedMasks:
    """What training leaves; on CPU, fp32.

    Attributes:
        scores_LEF: of each neuron in each expert, which has those of positive score.
        router_LED: rows of the routers.
    """

    scores_LEF: Tensor
    router_LED: Tensor

    @property
    def active_share(self) -> float:
        """Mean over layers of the share of the dense FFN's neurons that the widest expert has: near p once trained."""
        return (self.scores_LEF > 0).float().mean(-1).amax(-1).mean().item()


class MaskTraining:
    """A frozen model with gates, the hypernetwork that makes their masks, and the optimizer of both.

    Args:
        model: a dense decoder of transformers; its weights are frozen, and gates are put in until `finish`.
        options: how.

    Attributes:
        gated: the model with gates.
        hypernet: makes the masks.
        generator: of the noise.
    """

    def __init__(self, model: Any, options: ToMoEOptions) -> None:
        self.options = options
        self.device = next(model.parameters()).device
        config = model.config
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(options.seed)  # of the CPU only: a GPU's stays as it is
            self.gated = GatedModel(model, options.num_experts)
            self.hypernet = HyperNetwork(
                config.num_hidden_layers, options.num_experts, config.intermediate_size, options.offset
            )
        self.hypernet.to(self.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.gated.set_noise(options.temperature, self.generator)
        self.trained = nn.ModuleList([self.hypernet, *self.gated.gates])
        self._optimizer = torch.optim.AdamW(
            self.trained.parameters(), lr=options.lr, betas=(0.9, 0.999), weight_decay=options.weight_decay
        )

    def losses(self, input_ids_BL: Tensor) -> dict[str, Tensor]:
        """The parts of the loss, () fp32 each and without their factors, for masks and choices drawn now."""
        options = self.options
        scores_LEF = self.hypernet()
        self.gated.set_masks(sample_masks(scores_LEF, options.temperature, self.generator))
        # Of the masks without noise, which are those that stay: the widest of several noisy ones is wider than any is without.
        masks_LEF = hard_masks(scores_LEF, options.temperature)
        input_ids_BL = input_ids_BL.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bf16):
            with torch.no_grad():
                teacher_BLV = self.gated.logits(input_ids_BL, on=False)
            student_BLV = self.gated.logits(input_ids_BL, on=True)
        balances = [losses.balance(gate.last_logits_TE) for gate in self.gated.gates]
        return {
            "kd": distillation(student_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1)),
            "param": losses.size(masks_LEF, options.active_share),
            "union": losses.union(masks_LEF),
            "balance": torch.stack(balances).mean(),
        }

    def step(self, input_ids_BL: Tensor) -> dict[str, float]:
        """One optimizer step; the parts of the loss and their sum "loss"."""
        options = self.options
        parts = self.losses(input_ids_BL)
        factors = {name: getattr(options, f"{name}_coef") for name in parts}
        loss = torch.stack([factors[name] * value for name, value in parts.items()]).sum()
        if not bool(loss.isfinite()):
            raise ValueError(f"the loss is {loss.item()}; lower tomoe.lr={options.lr}, or use fp32 (tomoe.bf16=false)")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return {name: value.item() for name, value in parts.items()} | {"loss": loss.item()}

    @torch.no_grad()
    def result(self) -> TrainedMasks:
        """The masks and routers as they are now."""
        router_LED = torch.stack([gate.router.weight for gate in self.gated.gates])
        return TrainedMasks(scores_LEF=self.hypernet().cpu(), router_LED=router_LED.cpu())


def batches(windows_BL: Tensor, options: ToMoEOptions) -> Iterator[Tensor]:
    """Batches for all steps: passes through the windows, each in another order."""
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    for _ in range(options.steps):
        while len(order) < options.batch_size:
            order += torch.randperm(len(windows_BL), generator=generator).tolist()
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        yield windows_BL[chosen]


def train_masks(
    model: Any,
    windows_BL: Tensor,
    options: ToMoEOptions,
    progress: Progress | None = None,
) -> TrainedMasks:
    """Train masks for a dense decoder.

    Args:
        model: a dense decoder of transformers, on the device to train on.
        windows_BL: int64 token ids of the calibration text.
        options: how.
        progress: called with steps done, in all, and the parts of the loss.

    Raises:
        ValueError: the architecture is not known, or the loss is not finite.
    """
    training = MaskTraining(model, options)
    try:
        for step, input_ids_BL in enumerate(batches(windows_BL, options), start=1):
            parts = training.step(input_ids_BL)
            if progress is not None:
                progress(step, options.steps, parts)
        return training.result()
    finally:
        training.gated.remove()
