"""The door: which implementation a process gets."""

import pytest
import torch
from helpers.ffn_case import make_case, run

from moe.kernels import ops, reference


def test_the_switch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([0, 1], [1, 0], top_k=1, num_tokens=2, num_experts=2)
    for name in ops._EXPERT_FFN:
        monkeypatch.setitem(ops._EXPERT_FFN, name, lambda *args, name=name: torch.zeros(()) + len(name))
    for name in ops._EXPERT_FFN:
        monkeypatch.setenv("MOE_KERNELS", name)
        assert ops.chosen() == name
        assert run(case, (False,) * 4)["y"] == len(name)


def test_default_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_KERNELS", raising=False)
    assert ops.chosen() in ops._EXPERT_FFN
    assert ops.chosen() != "reference"


def test_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS", "fastest")
    case = make_case([0], [0], top_k=1, num_tokens=1, num_experts=1)
    with pytest.raises(ValueError, match=r"MOE_KERNELS='fastest'.*'grouped', 'reference'.*unset"):
        run(case)


@pytest.mark.parametrize("name", list(ops._EXPERT_FFN))
def test_unknown_activation_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MOE_KERNELS", name)
    case = make_case([0], [0], top_k=1, num_tokens=1, num_experts=1, activation="relu")
    with pytest.raises(ValueError, match=r"activation='relu'.*'swiglu' or 'gelu'"):
        run(case)
    with pytest.raises(ValueError, match=r"activation='relu'.*'swiglu' or 'gelu'"):
        reference.activate(torch.zeros(1, 2), "relu")
