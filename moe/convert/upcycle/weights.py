"""One MoE layer from one layer's dense FFNs, by any method.

Legend: D model, F expert FFN, H = 2F (with a gate) or F, E experts.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.convert.dense import DenseFFN, read_ffn
from moe.convert.upcycle import UPCYCLERS, UpcycleOptions
from moe.models.folder import ModelFolder
from moe.models.moe_weights import MoEWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layer_weights(folders: Sequence[ModelFolder], layer: int, options: UpcycleOptions) -> MoEWeights:
    """The MoE layer that takes the place of the FFNs of decoder layer ``layer``, in the dtype of the result."""
    method, dtype = UPCYCLERS[options.method], DTYPES.get(options.dtype)
    sources = [_cast(read_ffn(folder, layer), dtype) for folder in folders]
    down_DF = sources[0].down_DF
    # Streams of their own: methods with the same seed have the same gate.
    gate_ED = method.gate(down_DF.shape[0], options, _generator(options.seed, layer, "gate"))
    stacked = _stack(method.experts(sources, options, _generator(options.seed, layer, "experts")), options.num_experts)
    shared = method.shared(sources, options)
    router = {"weight": gate_ED.to(down_DF.dtype)}
    if options.score == "sigmoid":
        router["bias_E"] = torch.zeros(options.num_experts)
    return MoEWeights(
        router=router,
        gate_up_EHD=stacked.gate_up_EHD,
        down_EDF=stacked.down_EDF,
        shared_gate_up_HD=None if shared is None else torch.cat(_parts(shared)),
        shared_down_DF=None if shared is None else shared.down_DF,
    )


@dataclass(frozen=True, kw_only=True)
class _Stack:
    gate_up_EHD: Tensor
    down_EDF: Tensor


def _stack(experts: Iterable[DenseFFN], num_experts: int) -> _Stack:
    """Experts one behind the other; holds one of them besides the result."""
    stacked: _Stack | None = None
    count = 0
    for expert in experts:
        parts, down_DF = _parts(expert), expert.down_DF
        if stacked is None:
            height, dim = sum(len(part) for part in parts), down_DF.shape[0]
            stacked = _Stack(
                gate_up_EHD=down_DF.new_empty(num_experts, height, dim),
                down_EDF=down_DF.new_empty(num_experts, *down_DF.shape),
            )
        torch.cat(parts, out=stacked.gate_up_EHD[count])
        stacked.down_EDF[count] = down_DF
        count += 1
        del expert, parts, down_DF  # else the next one is made while this one is still held
    assert stacked is not None
    assert count == num_experts, f"{count} experts of {num_experts}"
    return stacked


def _parts(ffn: DenseFFN) -> list[Tensor]:
    return [ffn.up_FD] if ffn.gate_FD is None else [ffn.gate_FD, ffn.up_FD]


def _cast(ffn: DenseFFN, dtype: torch.dtype | None) -> DenseFFN:
    if dtype is None:
        return ffn
    gate_FD = None if ffn.gate_FD is None else ffn.gate_FD.to(dtype)
    return DenseFFN(gate_FD=gate_FD, up_FD=ffn.up_FD.to(dtype), down_DF=ffn.down_DF.to(dtype))


def _generator(seed: int, layer: int, use: str) -> torch.Generator:
    """Random numbers of one layer, whichever others are converted; torch's generator keeps 32 bits of a seed."""
    return torch.Generator().manual_seed(random.Random(f"{seed}/{layer}/{use}").getrandbits(32))
