"""What the expert FFN keeps for backward, in bytes: x, the pre-activation, the combine weights, and the parameters."""

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks import cpu_train
from moe.kernels import grouped


@pytest.mark.parametrize("dtype_name", ["bf16", "fp32"])
def test_saved_bytes(dtype_name: str) -> None:
    shape = dataclasses.replace(cpu_train.SHAPES[0], num_tokens=128)
    block = cpu_train.make_block(shape, dtype_name)
    experts, x_TD = block.ours.experts, block.x_BLD[0].requires_grad_()
    routing = block.ours.router(block.x_BLD[0])
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        grouped.expert_ffn(x_TD, routing, experts.gate_up_proj, experts.down_proj, "swiglu")
    num_rows, itemsize = shape.num_tokens * shape.top_k, x_TD.element_size()
    expected = shape.num_tokens * shape.dim * itemsize  # x
    expected += num_rows * 2 * shape.hidden * itemsize  # pre-activation
    expected += num_rows * 4  # combine weights, fp32
    expected += sum(parameter.numel() for parameter in experts.parameters()) * itemsize
    assert sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) == expected
