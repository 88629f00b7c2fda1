"""The fixture that fills uninitialised memory with NaN does so in kernels, and only there."""

import torch

from moe.kernels import grouped


def test_kernels_get_poison() -> None:
    assert grouped.torch.empty(3, 2).isnan().all()
    assert grouped.torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    assert (grouped.torch.empty_like(torch.ones(3, dtype=torch.int64)) < 0).all()
    inside = eval("x.new_empty(3)", {"__name__": "moe.kernels.some", "x": torch.ones(2)})
    assert inside.isnan().all()
    buffer = grouped._scratch.take("test", torch.ones(1), 2, 2)
    buffer.fill_(1.0)
    assert grouped._scratch.take("test", torch.ones(1), 2, 2).isnan().all()


def test_others_do_not() -> None:
    assert torch.empty is not grouped.torch.empty
    assert torch.empty.__module__ != "conftest"
    torch.ones(2).new_empty(3)  # goes through the wrapper without error
