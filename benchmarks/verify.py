"""The gate before every benchmark: no time is measured, let alone a speed-up printed, while a result is wrong."""

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.spec import Benchmark, Check, Options

# RMS of the difference over the RMS of the expected tensor. Both sides round in their own dtype and order, so two correct
# bf16 results are about three roundings (3 x 2^-9) apart; the router's gradient is a difference of such numbers.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


class RedGate(Exception):
    """At least one check failed; the message lists which."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of ``expected``; infinite where shapes differ or a value is not finite."""
    if got.shape != expected.shape or not bool(got.isfinite().all()):
        return float("inf")
    scale = expected.float().square().mean().sqrt().item()
    error = (got.float() - expected.float()).square().mean().sqrt().item()
    return error / scale if scale else error


def compare(
    name: str, got: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype, factor: float = 1.0
) -> list[Check]:
    """One check per tensor; the two sides must have the same names. ``factor`` loosens the dtype's tolerance."""
    assert got.keys() == expected.keys(), f"{name}: {sorted(got)} against {sorted(expected)}"
    limit = TOLERANCES[dtype] * factor
    return [
        Check(name=f"{name}: {key}", error=relative_error(got[key], expected[key]), limit=limit) for key in expected
    ]


def verify(benchmark: Benchmark, options: Options) -> list[Check]:
    """Run the benchmark's gate.

    Raises:
        RedGate: when a check failed, or when there was none.
    """
    checks = benchmark.gate(options)
    if not checks:
        raise RedGate(f"the gate of {benchmark.name} checked nothing")
    for check in checks:
        options.report(f"{'ok ' if check.passed else 'RED'} {check.name}: {check.error:.1e} (limit {check.limit:.0e})")
    wrong = [f"{check.name}: {check.error:.2e}, limit {check.limit:.0e}" for check in checks if not check.passed]
    if wrong:
        raise RedGate(f"{len(wrong)} of {len(checks)} checks of {benchmark.name} failed:\n  " + "\n  ".join(wrong))
    return checks
