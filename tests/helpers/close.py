"""The one tolerance table: how far a result may be from its float64 oracle."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Bounds on the error divided by the RMS of the expected tensor.

    Attributes:
        worst: on the largest element of the error.
        rms: on the RMS of the error.
    """

    worst: float
    rms: float


# A bf16 result is rounded about four times on its way (pre-activation, activation, product with the weight, sum).
TOLERANCES = {
    torch.float64: Tolerance(worst=1e-9, rms=1e-10),
    torch.float32: Tolerance(worst=2e-5, rms=3e-6),
    torch.float16: Tolerance(worst=1e-2, rms=2e-3),
    torch.bfloat16: Tolerance(worst=8e-2, rms=2.5e-2),
}


def assert_close(name: str, got: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    """Fail unless ``got`` has the expected shape and is within ``TOLERANCES[dtype]`` of it.

    Where every expected element is zero, every element of ``got`` must be.
    """
    assert got is not None, f"{name}: missing"
    assert expected is not None, f"{name}: the oracle has none"
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.numel() == 0:
        return
    got64, expected64 = got.detach().double(), expected.detach().double()
    assert got64.isfinite().all(), f"{name}: {int((~got64.isfinite()).sum())} elements are not finite"
    error, scale = got64 - expected64, expected64.square().mean().sqrt().item()
    worst, rms = error.abs().max().item(), error.square().mean().sqrt().item()
    limit = TOLERANCES[dtype]
    assert worst <= limit.worst * scale, f"{name}: worst error {worst:.2e}, RMS of expected {scale:.2e}, {limit}"
    assert rms <= limit.rms * scale, f"{name}: RMS error {rms:.2e}, RMS of expected {scale:.2e}, {limit}"
