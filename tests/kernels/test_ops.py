"""The door: which implementation a process gets."""

import warnings

import pytest
import torch
import triton
from helpers.ffn_case import make_case, run

from moe.kernels import ops, reference


def test_the_switch_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([0, 1], [1, 0], top_k=1, num_tokens=2, num_experts=2)
    for name in ops.NAMES:
        monkeypatch.setitem(ops._EXPERT_FFN, name, lambda *args, name=name: torch.zeros(()) + len(name))
    for name in ops.NAMES:
        monkeypatch.setenv("MOE_KERNELS", name)
        assert ops.chosen() == name
        assert run(case, (False,) * 4)["y"] == len(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_forced_choice_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS", "triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"MOE_KERNELS='triton' cannot run: a CPU tensor needs .*unset it"):
        ops.chosen("cpu")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert ops.chosen("cpu") == "triton"
    with pytest.raises(ValueError, match=r"cannot run: dtype torch.float64 is none of .*bfloat16"):
        ops.chosen("cpu", torch.float64)


def test_an_automatic_choice_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_KERNELS", raising=False)
    monkeypatch.setattr(ops, "_triton_problem", lambda device_type, dtype: None)
    assert ops.chosen("cuda", torch.bfloat16) == "triton"
    monkeypatch.setattr(ops, "_triton_problem", lambda device_type, dtype: f"no {dtype} here")
    ops._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="fused kernels are not used, plain torch is: no torch.float64 here"):
        assert ops.chosen("cuda", torch.float64) == "grouped"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.chosen("cuda", torch.float64) == "grouped"


def test_default_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_KERNELS", raising=False)
    assert ops.chosen("cpu") == "grouped"


def test_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS", "fastest")
    case = make_case([0], [0], top_k=1, num_tokens=1, num_experts=1)
    with pytest.raises(ValueError, match=r"MOE_KERNELS='fastest'.*'grouped', 'reference', 'triton'.*unset"):
        run(case)


@pytest.mark.parametrize("name", ops.NAMES)
def test_unknown_activation_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MOE_KERNELS", name)
    case = make_case([0], [0], top_k=1, num_tokens=1, num_experts=1, activation="relu")
    with pytest.raises(ValueError, match=r"activation='relu'.*'swiglu' or 'gelu'"):
        run(case)
    with pytest.raises(ValueError, match=r"activation='relu'.*'swiglu' or 'gelu'"):
        reference.activate(torch.zeros(1, 2), "relu")
