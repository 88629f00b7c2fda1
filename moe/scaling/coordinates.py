"""Coordinate check: how large every module's output and its change are, as training starts, at several widths.

Under a right parametrization neither depends on the width (arXiv 2203.03466 appendix D.1). Sizes are root mean squares over
the output's coordinates on one fixed batch.

What is judged: the size of outputs as they are after the steps (``activation``), and the size of their change since
initialisation (``update``). Logits of the vocabulary and of routers, and gates, map width to a finite number: their initial
weights give random sums that shrink with width by design (1 / sqrt(width)), whatever the input. Of them, what is judged is what
training added: the output of the weights as they are, less that of the initial weights for the same input.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from moe.experts import ExpertBank, SharedExperts
from moe.layer import MoELayer
from moe.routers import Router
from moe.scaling.mup import width_factors
from moe.types import Routing, SoftRouting

ACTIVATION, UPDATE = "activation", "update"


@dataclass
class Sizes:
    """Root mean squares by (module, quantity) and step; step 0 is before any update and has no change."""

    by_step: dict[int, dict[tuple[str, str], float]] = field(default_factory=dict)

    def get(self, module: str, quantity: str, step: int) -> float:
        """One size."""
        return self.by_step[step][module, quantity]


class OutputRecorder:
    """Collects the outputs of a model's modules in a forward pass; use as a context manager.

    Args:
        model: whose modules of all layers are recorded, each by its own name; routers count by their logits.
        initial: initial parameters by name, of the modules for which the change is taken at the same input.

    Attributes:
        outputs: by module.
        learned: by module with initial parameters: its output less that of those parameters.
    """

    def __init__(self, model: PreTrainedModel, initial: dict[str, dict[str, Tensor]]) -> None:
        self._model, self._initial = model, initial
        self.outputs: dict[str, Tensor] = {}
        self.learned: dict[str, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "OutputRecorder":
        wanted = (nn.Linear, nn.Embedding, ExpertBank, SharedExperts, MoELayer, Router)
        for name, module in self._model.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(module, wanted) or last in ("self_attn", "mlp") or last.endswith("norm"):
                self._hooks.append(module.register_forward_hook(self._keep(name)))
        return self

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if (found := _tensor_of(output)) is None:
                return
            self.outputs[name] = found
            if name in self._initial:
                initial = {f"module.{key}": value for key, value in self._initial[name].items()}
                self.learned[name] = found - functional_call(_Quiet(module), initial, arguments)

        return hook

    def __exit__(self, *problem: object) -> None:
        for hook in self._hooks:
            hook.remove()


class _Quiet(nn.Module):
    """A module without its hooks, and with its output as one tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Tensor:
        """As `_tensor_of`."""
        found = _tensor_of(self.module.forward(*arguments))
        assert found is not None
        return found


def _tensor_of(output: Any) -> Tensor | None:
    """What counts of a module's output, in fp32."""
    if isinstance(output, (Routing, SoftRouting)):
        output = output.logits_TE
    elif isinstance(output, tuple):
        output = output[0]
    return output.detach().float() if isinstance(output, Tensor) else None


def measure_sizes(
    model: PreTrainedModel, input_ids_BL: Tensor, train_step: Callable[[], None], num_steps: int
) -> Sizes:
    """Sizes at initialisation and after each of ``num_steps`` optimizer steps.

    Args:
        model: freshly initialised, in training mode; a dropless, noiseless one, or the change has noise in it.
        input_ids_BL: (B, L) the batch on which outputs are compared.
        train_step: one optimizer step.
        num_steps: how many.
    """
    sizes = Sizes()
    first: dict[str, Tensor] = {}
    initial = {
        name: {key: value.detach().clone() for key, value in model.get_submodule(name).named_parameters()}
        for name in output_modules(model)
    }
    # A tied unembedding has its 1 / r in the norm before it, which is as it should be when divided by it.
    norm, norm_factor = "model.norm", width_factors(model)["model.norm.weight"].init
    for step in range(num_steps + 1):
        if step:
            train_step()
        with OutputRecorder(model, initial) as recorder, torch.no_grad():
            model.eval()
            model(input_ids=input_ids_BL)
            model.train()
        found = sizes.by_step.setdefault(step, {})
        recorder.outputs[norm] = recorder.outputs[norm] / norm_factor
        for name, output in recorder.outputs.items():
            found[name, ACTIVATION] = _rms(output)
            if step:
                found[name, UPDATE] = _rms(recorder.learned[name] if name in initial else output - first[name])
        if not step:
            first = recorder.outputs
    return sizes


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one size of one kind of module depends on width.

    Attributes:
        module: its name with the layer's number left out.
        quantity: "activation" or "update".
        step: optimizer steps done.
        sizes: mean over seeds (and layers), by width.
        judged: False for what shrinks by design.
    """

    module: str
    quantity: str
    step: int
    sizes: dict[int, float]
    judged: bool

    @property
    def spread(self) -> float:
        """Largest over smallest size, less one: the trend and the noise of initial values."""
        return max(self.sizes.values()) / max(min(self.sizes.values()), 1e-30) - 1.0

    @property
    def change(self) -> float:
        """From the smallest width to the largest, by the least-squares line of log size over log width: 0.2 is 20 % more.

        A decrease counts as its inverse: a half is 1, as a double is.
        """
        widths = torch.tensor(list(self.sizes), dtype=torch.float64).log()
        logs = torch.tensor(list(self.sizes.values()), dtype=torch.float64).clamp_min(1e-30).log()
        centred = widths - widths.mean()
        slope = (centred * logs).sum() / centred.square().sum()
        return math.expm1(float(slope.abs() * (widths.max() - widths.min())))


def verdicts(runs: dict[int, list[Sizes]], steps: Iterable[int], outputs: Iterable[str]) -> list[Verdict]:
    """One per kind of module, quantity and step.

    Args:
        runs: by width, the sizes of each seed.
        steps: which to judge.
        outputs: modules that map width to a finite number (`output_modules`).
    """
    found, output_kinds = [], {module_kind(name) for name in outputs}
    for step in steps:
        collected: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for width, seeds in runs.items():
            for sizes in seeds:
                for (module, quantity), size in sizes.by_step[step].items():
                    collected[module_kind(module), quantity][width].append(size)
        for (kind, quantity), by_width in collected.items():
            means = {width: sum(values) / len(values) for width, values in sorted(by_width.items())}
            judged = quantity == UPDATE or kind not in output_kinds
            found.append(Verdict(module=kind, quantity=quantity, step=step, sizes=means, judged=judged))
    return found


def module_kind(name: str) -> str:
    """A module's name without the layer's number."""
    return (
        ".".join(part for part in name.split(".") if not part.isdigit()).removeprefix("model.").removeprefix("layers.")
    )


def output_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that map width to a finite number."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if module is head or isinstance(module, Router) or name.endswith("shared_experts.gate")
    ]
