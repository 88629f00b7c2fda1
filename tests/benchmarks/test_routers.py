"""The benchmark `routers`: its data is what its parts say, routers are combined as in a layer, and a quick run works."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import pictures as pages
from benchmarks import record, run, tables
from benchmarks.registry import BENCHMARKS
from benchmarks.routers import (
    BENCHMARK,
    clusters,
    combine,
    gg_moe,
    multitask,
    pictures,
    protocol,
    settings,
    tabular,
    text,
)
from benchmarks.spec import Options, Row
from moe.layer import MoELayer, MoESpec
from moe.routers import ROUTERS, Router, parse_router
from moe.routers.assemble import routing_of_matrix
from moe.types import SoftRouting, TokenInfo

FEW = ("topk", "dselect_k", "expert_choice", "soft", "softmax, dense")
QUICK = Options(quick=True, repeats=1)


# --- combine


@pytest.mark.parametrize(
    "options",
    [
        {"name": "topk", "top_k": 2},
        {"name": "relu"},
        {"name": "expert_choice", "group": "sequence"},
        {"name": "soft", "group": "position", "group_size": 2, "slots_per_expert": 3},
        {"name": "soft", "group": "sequence", "group_size": 6},
        {"name": "mixture_of_tokens", "group_size": 4},
    ],
    ids=lambda options: options["name"],
)
def test_experts_are_combined_as_in_a_layer(options: dict) -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, MoESpec(num_experts=4, expert_hidden=6, router=options)).eval()
    layer.reset_parameters(0.5)
    x_BLD = torch.randn(4, 6, 8)
    x_TD = x_BLD.view(-1, 8)
    info = TokenInfo(num_sequences=4)

    def expert(index: int, rows: Tensor) -> Tensor:
        gate, up = (rows @ layer.experts.gate_up_proj[index].T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up @ layer.experts.down_proj[index].T

    with torch.no_grad():
        routing = layer.router(x_TD, info)
        got, expected = combine.apply_experts(x_TD, routing, expert), layer(x_BLD).view(-1, 8)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    if not isinstance(routing, SoftRouting):
        dense = torch.stack([expert(index, x_TD) for index in range(4)], 1)
        by_matrix = (combine.weight_matrix(routing, 24)[..., None] * dense).sum(1)
        torch.testing.assert_close(by_matrix, expected, rtol=1e-4, atol=1e-6)


def test_gradients_reach_experts_and_router() -> None:
    router_class, config = parse_router({"name": "topk", "top_k": 2})
    router = router_class(8, 4, config)
    weight = torch.randn(4, 8, 3, requires_grad=True)
    x_TD = torch.randn(10, 8)
    combine.apply_experts(x_TD, router(x_TD), lambda index, rows: rows @ weight[index]).square().sum().backward()
    assert weight.grad is not None
    assert router.get_parameter("weight").grad.abs().sum() > 0


def test_weights_of_soft_routings_add_up_over_slots_and_rows() -> None:
    combine_GMS = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]]])
    routing = SoftRouting(num_experts=2, dispatch_GMS=combine_GMS, combine_GMS=combine_GMS)
    expected = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    torch.testing.assert_close(combine.weight_matrix(routing, 2), expected)
    same = SoftRouting(
        num_experts=2, dispatch_GMS=combine_GMS, combine_GMS=combine_GMS, token_ids_GM=torch.tensor([[2, 2]])
    )
    torch.testing.assert_close(combine.weight_matrix(same, 3)[2], expected.sum(0))
    assert combine.evaluations(routing, 2) == 2.0


def test_a_step_moves_schedules_and_biases() -> None:
    router_class, config = parse_router({"name": "noaux_tc", "top_k": 1, "renormalize": False})
    router = router_class(8, 4, config)
    weights_TE = torch.zeros(6, 4)
    weights_TE[:, 1] = 1.0
    combine.finish_step(router, routing_of_matrix(weights_TE), 6, bias_update_rate=0.5)
    assert router.get_buffer("bias_E").tolist() == [0.5, -0.5, 0.5, 0.5]
    relu_class, relu_config = parse_router({"name": "relu", "top_k": 2, "l1_coef": 1.0, "l1_step": 2.0})
    relu = relu_class(8, 4, relu_config)
    for active, expected in ((3, 2.0), (1, 1.0)):  # of 4 experts per token; the target is 2
        weights_TE = torch.zeros(6, 4)
        weights_TE[:, :active] = 1.0
        combine.finish_step(relu, routing_of_matrix(weights_TE), 6)
        assert relu.get_buffer("l1_coef").item() == expected


# --- settings


def test_every_router_is_in_every_table() -> None:
    for table in (settings.TEXT, settings.CLUSTERS, settings.MULTITASK):
        assert {setting.name for setting in table} == set(ROUTERS)
        keys = [setting.key for setting in table]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("setting", settings.TEXT, ids=lambda setting: setting.key)
def test_text_settings_are_valid_and_in_budget(setting: settings.TextSetting) -> None:
    flops = text.ffn_flops(setting, 300, text.QUICK)
    assert flops == (4.0 if setting.note == settings.ALL_RUN else 1.0)
    assert setting.num_experts * setting.width == settings.NUM_EXPERTS


def gate_router(setting: settings.GateSetting, dim: int) -> Router:
    router_class, config = parse_router({"name": setting.name, **setting.options(100)})
    return router_class(dim, settings.NUM_EXPERTS, config)


@pytest.mark.parametrize(("table", "top_k"), [(settings.CLUSTERS, 1), (settings.MULTITASK, 2)])
def test_gate_settings_ask_for_the_same_number_of_experts(table: tuple[settings.GateSetting, ...], top_k: int) -> None:
    for setting in table:
        if not setting.left_out:
            asked = gate_router(setting, 16).mean_experts_per_token
            assert asked == top_k or setting.note or setting.key in ("kmeans", "gumbel hard"), setting.key


# --- clusters


def test_patches_are_the_four_parts_in_random_order() -> None:
    data = clusters.make_examples(3, 500)
    features_TPC, centers_TPC = data.x_TPD @ data.features_CD.T / 10, data.x_TPD @ data.centers_CD.T / 10
    rows = torch.arange(500)
    own_TP = features_TPC[rows, :, data.clusters_T]
    center_TP = centers_TPC[rows, :, data.clusters_T]
    place_T = center_TP.argmax(1)
    assert torch.bincount(place_T).min() > 80
    assert (center_TP[rows, place_T] >= 1 - 1e-3).all()
    assert (center_TP[rows, place_T] <= 2 + 1e-3).all()
    signal_T = own_TP.gather(1, own_TP.abs().argmax(1)[:, None])[:, 0]
    clear = signal_T.abs() > 0.5 - 1e-3
    assert clear.all()
    assert torch.equal(signal_T > 0, data.labels_T.bool())
    norm_TP = data.x_TPD.norm(dim=2) / 10
    assert norm_TP.max() < 3.01


def test_no_sum_over_patches_is_right_on_all_sign_combinations() -> None:
    """The argument for the ceiling, tried with random functions of a patch: at least one of eight cases is wrong."""
    generator = torch.Generator().manual_seed(0)
    best = 0
    for _ in range(20_000):
        v, minus_v, w, minus_w, c, d = torch.randn(6, generator=generator, dtype=torch.float64).tolist()
        right = 0
        for y, other in itertools.product((1, -1), repeat=2):
            first = (v if y > 0 else minus_v) + (w if other > 0 else minus_w) + c
            second = (w if y > 0 else minus_w) + (v if other > 0 else minus_v) + d
            right += (first * y > 0) + (second * y > 0)
        best = max(best, right)
    assert best == 7


def test_cluster_entropy() -> None:
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    one_each = torch.eye(4).repeat_interleave(2, 0)
    assert clusters.cluster_entropy(0.3 * one_each, ids) == pytest.approx(0, abs=1e-6)
    assert clusters.cluster_entropy(torch.ones(8, 4), ids) == pytest.approx(1.3863, abs=1e-4)
    pairs = torch.eye(4)[torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])]
    assert clusters.cluster_entropy(pairs, ids) == pytest.approx(0.6931, abs=1e-4)
    assert clusters.cluster_entropy(torch.zeros(8, 4), ids) == pytest.approx(1.3863, abs=1e-4)


def test_a_normalised_step_has_the_rate_as_length_and_idle_experts_stay() -> None:
    torch.manual_seed(0)
    experts = clusters.PatchExperts(2, 3, 3, 1.0)
    before = experts.weight_EHD.detach().clone(), experts.bias_EH.detach().clone()
    experts(0, torch.randn(5, 200)).square().sum().backward()
    experts.normalized_step(0.25)
    moved = [(now - then).flatten(1).norm(dim=1) for now, then in zip(experts.parameters(), before, strict=True)]
    torch.testing.assert_close(moved[0] + moved[1], torch.tensor([0.25, 0.0]))


def test_experts_see_one_patch_at_a_time() -> None:
    experts = clusters.PatchExperts(2, 3, 3, 1.0)
    x_TPD = torch.randn(5, 4, 50)
    shuffled = x_TPD[:, [2, 0, 3, 1]]
    torch.testing.assert_close(experts(1, x_TPD.flatten(1)), experts(1, shuffled.flatten(1)))


def test_gates_of_the_clusters_part_see_wrong_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(check.passed for check in clusters.gate(QUICK))
    monkeypatch.setattr(clusters, "FEATURE_NOISE", (0.0, 0.1))
    red = {check.name for check in clusters.gate(QUICK) if not check.passed}
    assert red == {"clusters: the sum of all features does in 65 %"}


# --- multitask


def test_recovery_counts_pairs_and_tasks() -> None:
    true = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    found = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    result = multitask.recovery(found, true)
    assert result.f1 == pytest.approx(8 / 9)
    assert result.exact == 0.5


def test_learned_experts_are_matched_in_any_order() -> None:
    true = multitask.make_tasks(5).weights_ME > 0
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    found = true[:, order]
    assert not torch.equal(found, true)
    assert torch.equal(found[:, multitask.best_order(found, true)], true)


def test_true_gates_explain_the_targets() -> None:
    tasks = multitask.make_tasks(5)
    assert torch.equal((tasks.weights_ME > 0).sum(1), torch.full((16,), 2))
    noise = tasks.targets_MT - tasks.weights_ME @ tasks.experts_ET
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    assert tasks.targets_MT.std().item() > 0.5


def test_dense_gates_find_known_experts() -> None:
    setting = next(setting for setting in settings.MULTITASK if setting.key == "softmax, dense")
    outcome = multitask.train(setting, "known", 0.03, seed=0, steps=300)
    assert outcome.found.exact == 1.0
    assert outcome.loss < 0.01
    assert outcome.used == pytest.approx(8)


# --- tabular


def test_splits_are_fixed_disjoint_and_cover_the_table() -> None:
    first, again, other = (tabular.load_table("wine", seed) for seed in (1, 1, 2))
    assert torch.equal(first.test.x_TD, again.test.x_TD)
    assert not torch.equal(first.test.y, other.test.y)
    sizes = [len(part.x_TD) for part in (first.train, first.valid, first.test)]
    assert sum(sizes) == 178
    assert sizes[1] == sizes[2] == 36
    rows = torch.cat([first.train.x_TD, first.valid.x_TD, first.test.x_TD])
    assert rows.unique(dim=0).shape[0] == 178
    for part in (first.valid, first.test):
        assert torch.bincount(part.y, minlength=3).min() >= 9


def test_mixture_is_the_weighted_sum_of_its_small_mlps() -> None:
    torch.manual_seed(0)
    model = gg_moe.TableMoE(5, 3, 16, sampled=False).eval()
    x_TD = torch.randn(7, 5)
    gates_TE = (x_TD @ model.gate.weight.T + model.gate.bias).softmax(-1)
    expected = torch.zeros(7, 3)
    for expert in range(gg_moe.NUM_EXPERTS):
        first, second, last = (weight[expert] for weight in model.weights)
        expected += gates_TE[:, expert : expert + 1] * (((x_TD @ first).relu() @ second).relu() @ last)
    torch.testing.assert_close(model(x_TD), expected)


def test_only_gg_moe_draws_its_gate() -> None:
    x_TD = torch.randn(7, 5)
    for sampled in (False, True):
        model = gg_moe.TableMoE(5, 3, 16, sampled=sampled).train()
        assert model.gate.training == sampled
        weights = [combine.weight_matrix(model.gate(x_TD), 7) for _ in range(2)]
        assert torch.equal(*weights) != sampled
        assert not model.eval().gate.training


def test_scores() -> None:
    y = torch.tensor([[0.0], [2.0], [4.0]])
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.constant_(model.bias, 2.0)
    assert tabular.score_of(model, tabular.Part(x_TD=torch.zeros(3, 1), y=y)) == pytest.approx(0.0)
    classes = torch.tensor([0, 0, 1])
    assert tabular.score_of(torch.nn.Identity(), tabular.Part(x_TD=torch.eye(3), y=classes)) == pytest.approx(1 / 3)


# --- text


def test_gate_sees_a_router_that_reads_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    leaky = settings.TextSetting(
        name="expert_choice", options=lambda steps: {"group": "sequence"}, label="expert_choice of sequences"
    )
    greedy = settings.TextSetting(name="topk", options=lambda steps: {"top_k": 3}, label="top-3 in disguise")
    monkeypatch.setattr(ROUTERS["expert_choice"], "causal_problem", lambda self: None)
    monkeypatch.setattr(text, "TEXT", (text.find("topk"), leaky, greedy))
    monkeypatch.setattr(text, "ffn_flops", lambda setting, steps, size: 1.0)
    red = {check.name for check in text.gate(QUICK) if not check.passed}
    assert red == {"text expert_choice of sequences: sees later tokens", "text top-3 in disguise: active parameters"}


def test_a_run_repeats_from_its_seed(tmp_path: Path) -> None:
    data = text.quick_data(tmp_path)
    job = text.Job(key="noisy_topk", seed=3, steps=4, size=text.QUICK, data=data, eval_windows=16)
    first, again = text.train(job), text.train(job)
    assert first.loss == again.loss
    assert first.used == 2.0
    assert first.max_violation is not None


# --- the whole


@pytest.fixture(scope="module")
def quick_rows() -> list[Row]:
    return BENCHMARK.run(QUICK, FEW)  # type: ignore[call-arg]


def test_quick_rows_fit_the_csv(quick_rows: list[Row]) -> None:
    for row in quick_rows:
        assert row.keys() <= set(BENCHMARK.columns), row.keys() - set(BENCHMARK.columns)
    assert {row["part"] for row in quick_rows} == set(BENCHMARK.parts)
    json.dumps(quick_rows, allow_nan=False)
    names = {row["router"] for row in quick_rows if row["part"] == "text"}
    assert names == {"dense", "topk", "dselect_k", "expert_choice", "soft"}
    left_out = [row for row in quick_rows if row["part"] == "clusters" and row["router"] == "soft"]
    assert [set(row) for row in left_out] == [{"part", "router", "note"}]


def test_each_part_shows_its_own_columns(
    quick_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    old = [row for row in quick_rows if row["part"] != "text"]
    new = [row for row in quick_rows if row["part"] == "text"]
    for date, rows in (("d1", old), ("d2", new)):
        record.append(BENCHMARK, [{"date": date, **row} for row in rows])
    shown = {part: tables.markdown(BENCHMARK, part=part).split("\n", 1)[0] for part in BENCHMARK.parts}
    for part, column in {
        "text": "loss",
        "clusters": "cluster entropy",
        "multitask": "exact",
        "tabular": "gain",
    }.items():
        assert f"| {column} |" in shown[part]
        others = [header for name, header in shown.items() if name != part and column != "loss"]
        assert not any(f"| {column} |" in header for header in others)
    assert "d2" in tables.markdown(BENCHMARK, part="text")
    assert "d1" in tables.markdown(BENCHMARK, part="clusters")


@pytest.mark.parametrize("part", BENCHMARK.parts)
def test_pictures_are_drawn_from_rows(
    part: str, quick_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    path = pictures.draw(part, [row for row in quick_rows if row["part"] == part])
    assert path == tmp_path / f"routers-{part}.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_one_part_may_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["routers", "--quick", "--part", "tabular", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {row["part"] for row in result["rows"]} == {"tabular"}
    for name, known in (("routers", "text, clusters, multitask, tabular"), ("learning", "none")):
        with pytest.raises(SystemExit):
            run.main([name, "--part", "speed"])
        assert f"it has {known}" in capsys.readouterr().err


def test_the_gate_covers_every_part_and_is_green() -> None:
    checks = BENCHMARKS["routers"]().gate(QUICK)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert {check.name.split(" ")[0].rstrip(":") for check in checks} == set(BENCHMARK.parts)


@pytest.fixture
def jobs() -> Iterator[list[multitask.Job]]:
    yield [multitask.Job(key=key, case="known", steps=2, seeds=(0,)) for key in ("topk", "relu")]


def test_results_come_in_the_order_of_the_jobs_from_processes_too(jobs: list[multitask.Job]) -> None:
    here = protocol.run_all(multitask.work, jobs, QUICK, str)
    there = protocol.run_all(multitask.work, jobs, Options(), str)
    assert [row["router"] for row in there] == ["topk", "relu"]
    assert there == here
