"""`router-overhead`: the gate sees a wrong router and wrong experts, and what is timed without experts still routes and learns."""

import pytest
import torch

from benchmarks import record, router_overhead
from benchmarks.spec import Options
from moe.layer import MoELayer
from moe.routers import ROUTERS
from moe.routers.losses import switch_loss
from moe.routers.topk import TopKRouter

pytestmark = pytest.mark.filterwarnings("ignore:router .* evaluates")  # groups are tiny here

QUICK = Options(quick=True, repeats=1)
CASE = router_overhead.make_case(router_overhead.QUICK_SHAPE, "fp32")


def test_the_gate_is_green_and_sees_a_wrong_router(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = router_overhead.gate(QUICK)
    assert [check.name for check in checks if not check.passed] == []
    names = " ".join(check.name for check in checks)
    assert all(f", {name}: " in names for name in router_overhead.sparse_routers(CASE))
    weigh = TopKRouter.weigh
    monkeypatch.setattr(TopKRouter, "weigh", lambda self, *tensors: weigh(self, *tensors) * 1.001)
    red = [check.name for check in router_overhead.gate(QUICK) if not check.passed]
    assert any("fp32, topk: weights" in name for name in red), red


def test_the_gate_sees_wrong_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    step = router_overhead._step

    def wrong(layer: MoELayer, case: router_overhead.Case) -> dict[str, torch.Tensor]:
        found = step(layer, case)
        if layer.exchange is None:
            found["d experts.down_proj"] = found["d experts.down_proj"] * 1.05
        return found

    monkeypatch.setattr(router_overhead, "_step", wrong)
    red = {check.name.rpartition(": ")[2] for check in router_overhead.gate(QUICK) if not check.passed}
    assert red == {"d experts.down_proj"}


def test_without_experts_routing_is_all_there() -> None:
    """Tokens pass; the router's gradient is that of its weights and of the balance loss; counts are there."""
    layer = router_overhead.make_layer("topk", CASE, 1)
    layer.exchange = router_overhead.without_experts
    found = router_overhead._step(layer, CASE)
    assert torch.equal(found["y"], CASE.x_BLD)
    assert int(layer.stats.counts_E.sum()) == CASE.shape.num_tokens * CASE.shape.top_k
    routing = layer.router(CASE.x_BLD.view(-1, CASE.shape.dim))
    loss = (routing.weights_N * router_overhead.upstream(routing.weights_N)).sum()
    loss = loss + layer.spec.balance.aux_coef * switch_loss(routing.probs_TE, routing.counts_E)
    (expected_ED,) = torch.autograd.grad(loss, layer.router.weight)
    torch.testing.assert_close(found["d router.weight"], expected_ED)
    assert expected_ED.abs().max() > 0.01


def test_rows_fit_the_csv_and_name_every_sparse_router() -> None:
    rows = router_overhead.run(QUICK)
    header = {*record.ENVIRONMENT, *router_overhead.BENCHMARK.columns}
    assert all(row.keys() <= header for row in rows)
    for dtype in ("bf16", "fp32"):
        parts = [row["part"] for row in rows if row["dtype"] == dtype]
        assert parts == [router_overhead.LAYER, router_overhead.PROJECTION, *router_overhead.sparse_routers(CASE)]
        assert set(ROUTERS) - set(parts) <= {"soft", "mixture_of_tokens"}
        (topk,) = (row for row in rows if row["dtype"] == dtype and row["part"] == "topk")
        assert topk["experts"] == CASE.shape.top_k
        assert topk["rest_percent"] is not None
