"""Quantised weights of an FFN case, small blocks for their kernels, and the fp8 FFN in float64 by a plain loop."""

import math
import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from helpers import oracles
from helpers.ffn_case import Case, routing_of
from helpers.triton_blocks import small_blocks
from moe.kernels import ops, triton_quantized_ops
from moe.kernels.quantized import QuantizedWeight, dequantize, quantize_weight
from moe.kernels.triton_tuning import Blocks

FP8 = torch.float8_e4m3fn
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels


def small_quantized_blocks(monkeypatch: pytest.MonkeyPatch, n: int = 32, k: int = 32) -> None:
    """Several blocks in every direction, also on tiny inputs."""
    small_blocks(monkeypatch)
    blocks = Blocks(m=16, n=n, k=k, group=2, warps=4, stages=2)
    monkeypatch.setattr(triton_quantized_ops, "blocks_for", lambda *_: blocks)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both weights of a case."""

    up: QuantizedWeight
    down: QuantizedWeight

    def to(self, device: str) -> "Pair":
        return Pair(up=_moved(self.up, device), down=_moved(self.down, device))


def _moved(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    zero_point = None if weight.zero_point is None else weight.zero_point.to(device)
    return replace(weight, packed=weight.packed.to(device), scale=weight.scale.to(device), zero_point=zero_point)


def quantize_case(case: Case, scheme: str, group_size: int | None = None, symmetric: bool = True) -> Pair:
    return Pair(
        up=quantize_weight(case.w_up_EHD, scheme, group_size, symmetric),
        down=quantize_weight(case.w_down_EDF, scheme, group_size, symmetric),
    )


def run_quantized(case: Case, pair: Pair) -> Tensor:
    """`ops.expert_ffn_quantized`; by the implementation that MOE_KERNELS names, on a GPU if that needs one."""
    device = DEVICE if os.environ.get("MOE_KERNELS") == "triton" else "cpu"
    x_TD, weights_N, pair = case.x_TD.to(device), case.weights_N.to(device), pair.to(device)
    y_TD = ops.expert_ffn_quantized(x_TD, routing_of(case, weights_N), pair.up, pair.down, case.activation)
    return y_TD.to(case.x_TD.device)


def expect_integer(case: Case, pair: Pair) -> Tensor:
    """The double loop in float64 on the weights as they are after dequantising."""
    dtype = case.x_TD.dtype
    up_EHD, down_EDF = (dequantize(weight, dtype).double() for weight in (pair.up, pair.down))
    return oracles.expert_ffn(
        case.x_TD.double(), case.token_ids, case.expert_ids, case.weights_N.double(), up_EHD, down_EDF, case.activation
    )


def round_fp8(row: Tensor) -> Tensor:
    """The nearest fp8 values of one row, with the row's largest as fp8's largest; float64."""
    scale = row.float().abs().max() / 448
    return (row.float() / scale).to(FP8).double() * scale.double() if scale else row.double() * 0


def block_scales(weight: QuantizedWeight) -> Tensor:
    """The scale of every element of an fp8 weight; (E, P, Q) float64."""
    _, num_rows, num_columns = weight.shape
    p, q = torch.arange(num_rows)[:, None], torch.arange(num_columns)[None, :]
    return (
        weight.scale[:, p, q * 0].double()
        if weight.group_size is None
        else weight.scale[:, p // 128, q // 128].double()
    )


def fp8_hidden(x_D: Tensor, up_HD: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Pre-activation and activation in float64 of one token; ``up_HD`` are values that fp8 holds."""
    h_H = up_HD @ round_fp8(x_D)
    if activation == "swiglu":
        gate_F, up_F = h_H.chunk(2)
        return h_H, gate_F / (1 + torch.exp(-gate_F)) * up_F
    return h_H, 0.5 * h_H * (1 + torch.erf(h_H / math.sqrt(2)))


def expect_fp8(case: Case, pair: Pair) -> Tensor:
    """Rows, activations and weights rounded to fp8, everything between in float64."""
    up_EHD, down_EDF = (w.packed.double() * block_scales(w) for w in (pair.up, pair.down))
    y_TD = torch.zeros(case.x_TD.shape, dtype=torch.float64)
    for n, (t, e) in enumerate(zip(case.token_ids, case.expert_ids, strict=True)):
        _, a_F = fp8_hidden(case.x_TD[t], up_EHD[e], case.activation)
        y_TD[t] += case.weights_N[n].double() * (down_EDF[e] @ round_fp8(a_F.to(case.x_TD.dtype)))
    return y_TD
