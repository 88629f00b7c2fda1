"""Quantises one decoder layer: scaling, then rounding of every matrix, in the order in which the layer uses them.

Legend: T tokens, D model, E experts, P output rows, Q reduced columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor, nn

from moe.quant.grids import Rounded, Scales
from moe.quant.inputs import LayerInputs, Rows
from moe.quant.layer import Matrix, matrices
from moe.quant.options import QuantOptions
from moe.quant.report import ErrorMeter, MatrixReport
from moe.quant.rounded import RoundedLayer
from moe.quant.rounding import ROUNDERS
from moe.quant.router import CLIPS, align_router
from moe.quant.scaling import scale_layer
from moe.quant.schemes import Scheme

_STACK_BYTES = 1 << 30  # of fp32 weights that are rounded at a time


@dataclass(frozen=True, kw_only=True)
class Step:
    """A quantised layer.

    Attributes:
        layer: as containers store it, on CPU.
        matrices: errors.
        notes: what was not scaled, and why.
    """

    layer: RoundedLayer
    matrices: list[MatrixReport]
    notes: list[str]


@torch.no_grad()
def quantize_layer(
    module: nn.Module,
    inputs: LayerInputs,
    options: QuantOptions,
    scheme: Scheme,
    dtypes: Mapping[str, torch.dtype],
    stored: torch.dtype,
    scale_dtype: torch.dtype,
    done: Callable[[str], None] = lambda name: None,
) -> Step:
    """Quantise a layer; its weights become those that the codes stand for.

    Args:
        module: the layer, in fp32.
        inputs: what it sees; scaled along.
        options: methods.
        scheme: grids.
        dtypes: of the checkpoint's tensors, by their names below the layer.
        stored: of most of them.
        scale_dtype: of scales.
        done: called with the name of each matrix, or stack of experts, that is rounded.
    """
    notes: list[str] = []
    if options.scaling is not None:
        notes = scale_layer(module, inputs, options.scaling, scheme, stored, rounds_router=scheme.rounds_router)
    dtypes = dict(dtypes) | round_router(module, inputs, options, scheme)
    rounded: dict[str, Rounded] = {}
    reports = []
    rounder = ROUNDERS[options.rounding]
    for name, stack in _stacks(module).items():
        errors, parts = ErrorMeter(scheme.activations), []
        at_once = max(1, _STACK_BYTES // (4 * stack[0].weight_PQ.numel()))
        for start in range(0, len(stack), at_once):
            here = stack[start : start + at_once]
            rows = _LazyRows(module, inputs, here)
            weights_EPQ = torch.stack([matrix.weight_PQ for matrix in here])
            made = rounder.round_stack(weights_EPQ, rows, scheme.weights, stored=scale_dtype, affinity=options.affinity)
            after_EPQ = made.dequantize()
            if not bool(after_EPQ.isfinite().all()):
                raise RuntimeError(f"{name} is not finite after {options.rounding}; this is a bug: please report it")
            for matrix, after_PQ, seen in zip(here, after_EPQ, rows, strict=True):
                errors.add(matrix.weight_PQ, after_PQ, seen)
                matrix.weight_PQ.copy_(after_PQ)
            parts.append(made)
        rounded[name] = _joined(parts, is_stack=stack[0].expert is not None)
        reports.append(errors.report(name))
        done(name)
    rest = {name: tensor.to("cpu", dtypes[name]) for name, tensor in module.state_dict().items() if name not in rounded}
    return Step(layer=RoundedLayer(rounded=rounded, rest=rest), matrices=reports, notes=notes)


def round_router(
    module: nn.Module, inputs: LayerInputs, options: QuantOptions, scheme: Scheme
) -> dict[str, torch.dtype]:
    """Round the router in place where the scheme does; gives the dtypes in which its weights have to be stored then."""
    clips = CLIPS if options.align_router else (1.0,)
    made = align_router(module, inputs, clips) if scheme.rounds_router else None
    # Products of codes and scales have more digits than bf16.
    return {} if made is None else dict.fromkeys(made.rounded, torch.float32)


def weights_of(layer: RoundedLayer) -> dict[str, Tensor]:
    """The whole state of a layer, as a server computes with it."""
    return layer.rest | {name: matrix.dequantize() for name, matrix in layer.rounded.items()}


def _stacks(module: nn.Module) -> dict[str, list[Matrix]]:
    """Matrices by the name of their parameter, experts together."""
    found: dict[str, list[Matrix]] = {}
    for matrix in matrices(module):
        found.setdefault(matrix.name, []).append(matrix)
    return found


class _LazyRows(Sequence[Rows]):
    """`LayerInputs.rows` of the matrices of a stack, made when they are asked for: those of all experts are K times the text."""

    def __init__(self, module: nn.Module, inputs: LayerInputs, stack: list[Matrix]) -> None:
        self._module, self._inputs, self._stack = module, inputs, stack

    def __len__(self) -> int:
        return len(self._stack)

    @overload
    def __getitem__(self, index: int) -> Rows: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Rows]: ...
    def __getitem__(self, index: int | slice) -> Rows | Sequence[Rows]:
        if isinstance(index, slice):
            return _LazyRows(self._module, self._inputs, self._stack[index])
        return self._inputs.rows(self._module, self._stack[index])


def _joined(parts: list[Rounded], is_stack: bool) -> Rounded:
    """Experts of one name, or the one matrix, on CPU."""

    def together(tensors: list[Tensor]) -> Tensor:
        whole = torch.cat([tensor.cpu() for tensor in tensors])
        return whole if is_stack else whole[0]

    zeros = [part.scales.zero for part in parts if part.scales.zero is not None]
    scales = Scales(scale=together([part.scales.scale for part in parts]), zero=together(zeros) if zeros else None)
    return Rounded(codes=together([part.codes for part in parts]), scales=scales, grid=parts[0].grid)
