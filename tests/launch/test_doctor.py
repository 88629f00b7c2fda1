"""`moe doctor`: the live checks pass here, and say what is wrong where something is."""

import json
import os
from typing import Any

import pytest
import torch
from helpers.runs import run_moe

from moe.launch import doctor
from moe.routers import ROUTERS
from moe.routers.topk import TopKRouter


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Without the processes of the expert-parallel check; what they would have been started with."""
    seen: dict[str, Any] = {}

    def run_local(arguments: list[str], processes: int, module: str) -> int:
        seen.update(module=module, processes=processes, check=os.environ.get("MOE_CHECK"))
        with open(arguments[1], "w") as file:
            json.dump({"output": 1e-7, "x": 2e-7}, file)
        return 0

    monkeypatch.setattr(doctor, "run_local", run_local)
    monkeypatch.delenv("MOE_CHECK", raising=False)
    return seen


def shown(findings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    doctor.render(findings)
    return " ".join(capsys.readouterr().err.split())


def test_the_command(tmp_path: Any) -> None:
    """The real processes, with expert parallelism between them."""
    ended = run_moe("doctor", "--json", folder=tmp_path)
    assert ended.status == 0, ended.stderr
    findings = json.loads(ended.stdout)
    assert findings["ok"] is True
    assert findings["routers"] == {"ok": True, "checked": list(ROUTERS), "failures": {}}
    assert findings["expert_parallel"]["ok"] is True
    assert len(findings["expert_parallel"]["relative_errors"]) >= 6


def test_every_router_runs_and_the_checks_are_on(no_ranks: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    findings = doctor.examine()
    assert findings["ok"] is True
    assert no_ranks == {"module": "moe.launch.selfcheck", "processes": 2, "check": "1"}
    assert "MOE_CHECK" not in os.environ, "only while it looks"
    assert f"routers ok: {len(ROUTERS)}, forward and backward" in shown(findings, capsys)
    json.dumps(findings)


@pytest.mark.parametrize("name", ROUTERS)
def test_nan_raises_in_that_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CHECK", "1")
    x_BLD = torch.randn(2, 4, 8)
    doctor.run_router(name, x_BLD)
    x_BLD[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=f"MOE_CHECK: the input of {ROUTERS[name].__name__} has 1 non-finite values"):
        doctor.run_router(name, x_BLD)


class Miscounting(TopKRouter):
    def forward(self, *arguments: Any) -> Any:
        routing = super().forward(*arguments)
        routing.counts_E.add_(1)
        return routing


class Exploding(TopKRouter):
    """Only its own gradient is wrong."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.weight.register_hook(lambda gradient: gradient * float("nan"))


def test_a_failing_router_is_named(
    no_ranks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ROUTERS, "miscounting", Miscounting)
    monkeypatch.setitem(ROUTERS, "exploding", Exploding)
    findings = doctor.examine()
    assert findings["ok"] is False and findings["routers"]["ok"] is False
    failures = findings["routers"]["failures"]
    assert failures.keys() == {"miscounting", "exploding"}
    assert "Miscounting returned a broken routing: its counts are not those of its list" in failures["miscounting"]
    assert failures["exploding"] == "ValueError: the gradient of router.weight is not finite"
    text = shown(findings, capsys)
    assert "routers FAILED: miscounting: ValueError: MOE_CHECK" in text
    assert "exploding: ValueError" in text
