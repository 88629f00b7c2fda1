"""Experts on several threads: the same bits as on one, and nothing else in the process changes."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.ffn_case import Case, check, forward, make_case, run

from moe.kernels import expert_threads
from moe.kernels.expert_threads import for_each_expert

CPU = torch.device("cpu")


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(expert_threads, "MIN_ROWS", 1)
    monkeypatch.setenv("MOE_KERNELS", "grouped")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def balanced(activation: str = "swiglu", dtype: torch.dtype = torch.float32) -> Case:
    """60 tokens with 2 of 6 experts; expert 4 has none."""
    used = [0, 1, 2, 3, 5]
    return make_case(
        [t for t in range(60) for _ in range(2)],
        [used[(t + 2 * k) % 5] for t in range(60) for k in range(2)],
        top_k=2,
        num_tokens=60,
        num_experts=6,
        dim=24,
        hidden=20,
        activation=activation,
        dtype=dtype,
    )


def who_ran(blocks: list[tuple[int, int, int]]) -> dict[int, str]:
    names: dict[int, str] = {}
    for_each_expert(blocks, CPU, lambda expert, start, stop: names.update({expert: threading.current_thread().name}))
    assert names.keys() == {expert for expert, _, _ in blocks}
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_right_and_the_same_bits(activation: str, dtype: torch.dtype, two_threads: None) -> None:
    case = balanced(activation, dtype)
    check(case)
    threaded = run(case)
    torch.set_num_threads(1)
    for name, value in run(case).items():
        assert torch.equal(threaded[name], value), name


def test_inference_mode(two_threads: None) -> None:
    case = balanced()
    with torch.inference_mode():
        y_TD = forward(case, case.leaves())
    assert torch.equal(y_TD, run(case)["y"])


def test_workers_are_used_when_it_pays(two_threads: None) -> None:
    even = [(expert, 10 * expert, 10 * expert + 10) for expert in range(4)]
    assert all(name.startswith("moe-experts") for name in who_ran(even).values())
    here = {threading.current_thread().name}
    assert set(who_ran([(0, 0, 70), (1, 70, 100)]).values()) == here, "one expert has most rows"
    assert set(who_ran([(3, 0, 5)]).values()) == here
    assert who_ran([]) == {}
    torch.set_num_threads(1)
    assert set(who_ran(even).values()) == here


def test_little_work_stays_here(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_threads, "MIN_ROWS", 21)
    assert set(who_ran([(0, 0, 10), (1, 10, 20)]).values()) == {threading.current_thread().name}


def test_thread_counts_outside_stay(two_threads: None) -> None:
    counts = set()
    for_each_expert([(0, 0, 10), (1, 10, 20)], CPU, lambda *block: counts.add(torch.get_num_threads()))
    assert counts == {1}
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


def test_an_error_reaches_the_caller(two_threads: None) -> None:
    def fail(expert: int, start: int, stop: int) -> None:
        raise IndexError(f"expert {expert}")

    with pytest.raises(IndexError, match="expert"):
        for_each_expert([(0, 0, 10), (1, 10, 20)], CPU, fail)
    assert who_ran([(0, 0, 10), (1, 10, 20)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_its_own(two_threads: None) -> None:
    blocks = [(0, 0, 10), (1, 10, 20)]
    who_ran(blocks)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(name.startswith("moe-experts") for name in who_ran(blocks).values()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
