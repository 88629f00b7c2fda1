"""Scratch buffers belong to a thread: concurrent calls do not see each other's rows."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.ffn_case import make_case, run

from moe.kernels import grouped


def test_concurrent_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS", "grouped")
    cases = [
        make_case(
            [t for t in range(200) for _ in range(2)],
            [(t * 7 + k + seed) % 5 for t in range(200) for k in range(2)],
            top_k=2,
            num_tokens=200,
            num_experts=5,
            dim=24,
            hidden=20,
            seed=seed,
        )
        for seed in range(2)
    ]
    expected = [run(case) for case in cases]
    barrier = threading.Barrier(2)

    def work(i: int) -> list[str]:
        wrong = []
        for repeat in range(10):
            barrier.wait(timeout=60)
            got = run(cases[i])
            wrong += [f"{repeat} {name}" for name, value in expected[i].items() if not torch.equal(got[name], value)]
        return wrong

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [[], []]


def test_each_thread_has_its_own_buffer() -> None:
    mine = grouped._scratch.take("test", torch.ones(1), 4, 4)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(grouped._scratch.take, "test", torch.ones(1), 4, 4).result()
    assert mine.data_ptr() != other.data_ptr()
    assert grouped._scratch.take("test", torch.ones(1), 2, 4).data_ptr() == mine.data_ptr()
