"""Modules that hold quantised weights: their state is what a checkpoint stores, and on CPU they compute from a faster layout.

The first forward on CPU repacks the weights for torch's kernels (`moe.kernels.quantized_cpu`), one after the other, and lets go of
the checkpoint's layout: a weight is there once. `state_dict`, `load_state_dict` and what moves a module bring that back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.kernels import ops
from moe.kernels.quantized import Multiplier, QuantizedWeight
from moe.kernels.quantized_cpu import CpuWeight, for_cpu

_PARTS = ("packed", "scale", "zero_point")


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What the buffers of a weight do not tell."""

    scheme: str
    shape: tuple[int, int, int]
    group_size: int | None


def in_autocast_dtype(x: Tensor) -> Tensor:
    """``x`` as autocast, if it is on, would give it to a product."""
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x


class QuantizedModule(nn.Module):
    """See the file.

    The buffers of a weight NAME are ``NAME_packed``, ``NAME_scale`` and ``NAME_zero_point``, as `QuantizedWeight` has them. They
    move between devices, but conversions of dtype (``module.half()``) pass them by. Products are in the dtype of the input.

    Args:
        weights: by name, all of one scheme.
        stacked: False, for modules of single matrices, leaves the first dimension out of the buffers.
    """

    def __init__(self, weights: Mapping[str, QuantizedWeight], stacked: bool = True) -> None:
        super().__init__()
        (self.scheme,) = {weight.scheme for weight in weights.values()}
        self._stacked = stacked
        self._forms = {
            name: _Form(scheme=weight.scheme, shape=weight.shape, group_size=weight.group_size)
            for name, weight in weights.items()
        }
        self._repacked: dict[str, CpuWeight] | None = None
        for name, weight in weights.items():
            for part, tensor in self._parts(weight).items():
                self.register_buffer(f"{name}_{part}", tensor)

    def weight(self, name: str) -> QuantizedWeight:
        """A weight as a checkpoint stores it."""
        if self._repacked is not None and name in self._repacked:
            return self._repacked[name].rows()
        form, parts = self._forms[name], {part: getattr(self, f"{name}_{part}") for part in _PARTS}
        if not self._stacked:
            parts = {part: None if tensor is None else tensor[None] for part, tensor in parts.items()}
        return QuantizedWeight(scheme=form.scheme, shape=form.shape, group_size=form.group_size, **parts)

    def multipliers(self, rows_nQ: Tensor) -> dict[str, Multiplier]:
        """All weights, in the layout in which such rows are multiplied."""
        self.lay_out(rows_nQ.device.type, rows_nQ.dtype)
        return {name: (self._repacked or {}).get(name) or self.weight(name) for name in self._forms}

    @torch.no_grad()
    def lay_out(self, device: str, dtype: torch.dtype) -> None:
        """Take the layout in which rows of ``dtype`` are multiplied on ``device``; the first forward does it too."""
        if torch.device(device).type == "cpu" and ops.chosen("cpu", dtype, self.scheme) == "grouped":
            self._repack()
        else:
            self._restore()

    @property
    def num_bytes(self) -> int:
        """Memory of all weights, in bytes."""
        return sum(((self._repacked or {}).get(name) or self.weight(name)).num_bytes for name in self._forms)

    def _repack(self) -> None:
        if self._repacked is not None:
            return
        self._repacked = {}
        for name in self._forms:
            if (fast := for_cpu(self.weight(name))) is not None:
                self._repacked[name] = fast
                self._set(name, dict.fromkeys(_PARTS))

    def _restore(self) -> None:
        for name, fast in (self._repacked or {}).items():
            self._set(name, self._parts(fast.rows()))
        self._repacked = None

    def _parts(self, weight: QuantizedWeight) -> dict[str, Tensor | None]:
        parts = {part: getattr(weight, part) for part in _PARTS}
        return parts if self._stacked else {part: None if t is None else t[0] for part, t in parts.items()}

    def _set(self, name: str, parts: Mapping[str, Tensor | None]) -> None:
        for part, tensor in parts.items():
            setattr(self, f"{name}_{part}", tensor)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, fast in (self._repacked or {}).items():
            parts = self._parts(fast.rows())
            destination |= {f"{prefix}{name}_{part}": t for part, t in parts.items() if t is not None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedModule":
        # What `to`, `half`, `cuda` do to every tensor; seen as bytes, codes and scales move but are not converted.
        self._restore()
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)
