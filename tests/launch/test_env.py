"""Devices, processes and threads that a run chooses before it starts."""

import os
import socket

import pytest

from moe.launch import env
from moe.train.config import ParallelConfig


def parallel(**values: object) -> ParallelConfig:
    return ParallelConfig.model_validate(values)


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (0, {}, 1),
        (0, {"ep_size": 4}, 4),
        (8, {}, 8),
        (8, {"ep_size": 4}, 8),
        (7, {"ep_size": 2}, 6),
        (1, {"ep_size": 2}, 2),
        (8, {"device": "cpu"}, 1),
        (8, {"device": "cpu", "ep_size": 2}, 2),
        (8, {"processes": 3}, 3),
    ],
)
def test_processes(monkeypatch: pytest.MonkeyPatch, gpus: int, settings: dict[str, object], expected: int) -> None:
    monkeypatch.setattr(env, "num_gpus", lambda: gpus)
    assert env.choose_processes(parallel(**settings)) == expected


@pytest.mark.parametrize(
    ("gpus", "processes", "device", "expected"),
    [
        (0, 1, "auto", "cpu"),
        (1, 2, "auto", "cpu"),
        (2, 2, "auto", "cuda"),
        (2, 2, "cpu", "cpu"),
        (2, 2, "cuda", "cuda"),
    ],
)
def test_device(monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, device: str, expected: str) -> None:
    monkeypatch.setattr(env, "num_gpus", lambda: gpus)
    assert env.choose_device(parallel(device=device), processes) == expected


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "num_gpus", lambda: 1)
    with pytest.raises(ValueError, match=r"parallel\.device=cuda .* 2 processes and there are 1; lower parallel\.proc"):
        env.choose_device(parallel(device="cuda"), 2)


def test_threads_share_the_cores_of_this_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert [env.threads_per_process(n) for n in (1, 2, 5, 12, 100)] == [12, 6, 2, 1, 1]


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", env.free_port()))
