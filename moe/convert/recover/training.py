"""The loop of recovery training: AdamW, warm-up and cosine, clipping, cross-entropy and the distance to a teacher.

Balance losses of the model's config act as in any training; a carved model's config has none. Routers: see `routers`.

Legend: B windows, L window length.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from moe.convert.distill import distillation
from moe.convert.recover.lora import add_lora
from moe.convert.recover.options import RecoverOptions
from moe.convert.recover.routers import RouterScale, moving_bias, router_parameters, router_scales
from moe.layer import finish_step, moe_layers
from moe.models.evaluate import perplexity

_FINAL_LR = 0.1  # of the peak


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where the training is.

    Attributes:
        step: optimizer steps done.
        tokens: trained on so far.
        loss: mean cross-entropy of the step's tokens, in nats; ``None`` before the first.
        distance: mean KL to the teacher, where there is one.
        held_out: loss on held-out text, where it was evaluated at this step.
    """

    step: int
    tokens: int
    loss: float | None = None
    distance: float | None = None
    held_out: float | None = None


class Recovery:
    """A model in training.

    Args:
        model: an `MoEForCausalLM` in fp32 on the device to train on; trained in place.
        windows_BL: int64 token ids to train on.
        held_out_BL: text that is not trained on.
        options: how.
        teacher: the model to stay close to, on the same device; frozen.

    Raises:
        ValueError: no MoE layers, LoRA without peft, or a teacher of another vocabulary.
    """

    def __init__(
        self, model: Any, windows_BL: Tensor, held_out_BL: Tensor, options: RecoverOptions, teacher: Any = None
    ) -> None:
        self.options, self._windows_BL, self._held_out_BL = options, windows_BL, held_out_BL
        self._device = next(model.parameters()).device
        self.layers = list(moe_layers(model).values())
        if not self.layers:
            raise ValueError("the model has no MoE layers of this framework; carve, upcycle or import one first")
        if teacher is not None and teacher.config.vocab_size != model.vocab_size:
            raise ValueError(
                f"--distill has a vocabulary of {teacher.config.vocab_size} tokens and the model one of {model.vocab_size}; "
                "give the dense model that it was made from"
            )
        self._teacher = None if teacher is None else teacher.requires_grad_(False).eval()
        self._trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._routers = [router_parameters(layer) for layer in self.layers]
        self._scales = self._measured(model) if options.router_lr or options.balance_rate else []
        with self._seeded():
            self.model = model if options.mode == "full" else add_lora(model, options.lora_rank, options.lora_alpha)
        for parameter in chain(*self._routers):
            parameter.requires_grad_(options.router_lr > 0)
        own = set(map(id, chain(*self._routers)))
        self._others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        self._optimizer = torch.optim.AdamW(self._groups(), lr=options.peak_lr, betas=(0.9, 0.95))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: lr_factor(options, step))
        self._order = _shuffled_forever(len(windows_BL), options.seed)

    def _measured(self, model: Any) -> list[RouterScale]:
        with self._autocast():
            return router_scales(model.eval(), self.layers, self._windows_BL[:1].to(self._device))

    def _groups(self) -> list[dict[str, Any]]:
        """Matrices, vectors, and every router tensor with its own learning rate."""
        options = self.options
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self._others if p.dim() >= 2], "weight_decay": options.weight_decay},
            {"params": [p for p in self._others if p.dim() < 2], "weight_decay": 0.0},
        ]
        for parameters, scale in zip(self._routers, self._scales, strict=True) if options.router_lr else ():
            for p in parameters:
                groups.append({"params": [p], "weight_decay": 0.0, "lr": scale.learning_rate(p, options.router_lr)})
        return [group for group in groups if group["params"]]

    def run(self, report: Callable[[Point], None] = lambda point: None) -> list[Point]:
        """Train all steps; the points that were reported, the first before any step. LoRA is merged into `model` then.

        Raises:
            ValueError: a loss is not finite.
        """
        options, points = self.options, []
        rates = [options.balance_rate * scale.score_spread for scale in self._scales] or [0.0] * len(self.layers)
        with self._seeded(), moving_bias(self.layers, rates):
            for step in range(options.steps + 1):
                point = self._step(step) if step else Point(step=0, tokens=0)
                ends = step in (0, options.steps)
                if ends or (options.eval_every and step % options.eval_every == 0):
                    point = replace(point, held_out=self._finite(self.evaluate(), f"held-out loss after step {step}"))
                points.append(point)
                report(point)
        if options.mode == "lora":
            self.model = self.model.merge_and_unload()
        for name in self._trainable:
            self.model.get_parameter(name).requires_grad_(True)
        self.model.eval()
        return points

    def evaluate(self) -> float:
        """Mean loss on the held-out text."""
        self.model.eval()
        with self._autocast():
            return perplexity(self.model, self._held_out_BL, batch_size=self.options.windows_per_forward)["loss"]

    def _step(self, step: int) -> Point:
        options = self.options
        num_parts = options.batch_size // options.windows_per_forward
        self.model.train()
        loss = distance = 0.0
        for _ in range(num_parts):
            rows = [next(self._order) for _ in range(options.windows_per_forward)]
            part, part_distance = self._losses(self._windows_BL[rows].to(self._device))
            total = part if part_distance is None else part + options.distill * part_distance
            (total / num_parts).backward()
            loss += part.item() / num_parts
            distance += 0.0 if part_distance is None else part_distance.item() / num_parts
        self._finite(loss, f"loss of step {step}")
        # Routers apart: the smaller their weights, the larger are their gradients, which would be all of one norm.
        for parameters in (self._others, list(chain(*self._routers))):
            torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        finish_step(self.layers)
        tokens = step * options.batch_size * self._windows_BL.shape[1]
        return Point(step=step, tokens=tokens, loss=loss, distance=None if self._teacher is None else distance)

    def _losses(self, input_ids_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy, and the distance to the teacher where there is one."""
        with self._autocast():
            out = self.model(input_ids=input_ids_BL, labels=input_ids_BL)
            if self._teacher is None:
                return out.loss, None
            with torch.no_grad():
                teacher_BLV = self._teacher(input_ids=input_ids_BL).logits
        return out.loss, distillation(out.logits.flatten(0, 1), teacher_BLV.flatten(0, 1))

    def _finite(self, loss: float, which: str) -> float:
        if not math.isfinite(loss):
            raise ValueError(f"the {which} is {loss}; lower recover.lr={self.options.peak_lr}")
        return loss

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """For new LoRA weights and the noise of routers; the process's own random state stays as it was."""
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(self.options.seed)
            yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.options.bf16)


def lr_factor(options: RecoverOptions, step: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) over its peak: linear warm-up, then a half cosine to a tenth."""
    warmup = math.ceil(options.warmup * options.steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(options.steps - warmup, 1)
    return _FINAL_LR + (1 - _FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))


def _shuffled_forever(count: int, seed: int) -> Iterator[int]:
    """Passes through ``range(count)``, each in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
