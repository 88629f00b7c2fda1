"""The study of router gradients: it runs, its gate can fail, its sums are what sampling gives, and facts that follow on paper."""

import pytest
import torch

from benchmarks import estimators, pictures, record, run
from benchmarks.estimators import ESTIMATORS, LOSSES, Moments, make_problem, measure, moments, targets
from benchmarks.spec import Options, Row
from moe.routers.sparsemixer import Rule

NONE = torch.zeros(0, 4, dtype=torch.float64)


def row(name: str, loss_name: str, num_experts: int = 4) -> Row:
    problems = [make_problem(num_experts, seed) for seed in range(4)]
    return measure(ESTIMATORS[name], problems, loss_name, [NONE] * 4)


def test_quick_run_records_nothing_and_draws_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    figures, draw = [], estimators.draw
    monkeypatch.setattr(estimators, "draw", lambda rows: figures.append(draw(rows)))
    monkeypatch.setattr(record, "append", lambda *args: pytest.fail("recorded"))
    monkeypatch.setattr(pictures, "save", lambda *args: pytest.fail("saved a picture"))
    result = run.execute(estimators.BENCHMARK, Options(quick=True))
    assert result["gate"] == "green"
    rows = result["rows"]
    assert len(rows) == 2 * len(LOSSES) * len(ESTIMATORS)
    assert all(set(found) <= set(estimators.BENCHMARK.columns) for found in rows)
    assert {found["part"] for found in rows} == {f"{loss}-{n}" for loss in LOSSES for n in (4, 16)}
    panels = figures[0].axes
    assert len(panels) == 6
    for panel in panels:
        assert [len(marks.get_offsets()) for marks in panel.collections] == [len(ESTIMATORS)] * len(LOSSES)
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list(ESTIMATORS)


def test_gate_sees_a_wrong_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(probs_T: torch.Tensor, full_T: torch.Tensor, rule: Rule) -> torch.Tensor:
        return torch.where(full_T, probs_T, probs_T / 2).detach() + 2 * (probs_T - probs_T.detach())

    assert all(check.passed for check in estimators.gate(Options(quick=True)))
    monkeypatch.setattr(estimators, "rule_weights", doubled)
    failed = {check.name for check in estimators.gate(Options(quick=True)) if not check.passed}
    assert "SparseMixer-v2, no argmax rule, linear, E=4" in failed
    assert "SparseMixer-v2*, no argmax rule, cubic, E=16" in failed
    assert not any(name.startswith(("SparseMixer, ", "REINFORCE", "full")) for name in failed)


@pytest.mark.parametrize("name", ["sampled", "REINFORCE", "SparseMixer-v2", "straight-through"])
def test_sums_over_outcomes_are_what_sampling_gives(name: str) -> None:
    """Draw outcomes by their chances instead; mean and variance agree within 5 standard errors."""
    problem, num_draws = make_problem(4, 0), 20_000
    outcomes, loss = ESTIMATORS[name].outcomes(problem.logits_E, NONE), problem.losses["quartic"]
    exact = moments(outcomes, problem.experts_ED, loss)
    samples_OE = torch.stack([_one(name, problem, index).mean_E for index in range(len(outcomes.chances_O))])
    torch.manual_seed(0)
    drawn_NE = samples_OE[outcomes.chances_O.multinomial(num_draws, replacement=True)]
    assert outcomes.chances_O.sum().item() == pytest.approx(1.0)
    assert (drawn_NE.mean(0) - exact.mean_E).norm() < 5 * (exact.variance / num_draws) ** 0.5
    assert drawn_NE.var(0).sum().item() == pytest.approx(exact.variance, rel=0.1)


def _one(name: str, problem: estimators.Problem, index: int) -> Moments:
    """The gradient of a single outcome."""
    outcomes = ESTIMATORS[name].outcomes(problem.logits_E, NONE)
    certain_O = torch.zeros_like(outcomes.chances_O)
    certain_O[index] = 1
    alone = estimators.Outcomes(
        logits_OE=outcomes.logits_OE,
        weights_OE=outcomes.weights_OE,
        chances_O=certain_O,
        scores_O=outcomes.scores_O,
    )
    return moments(alone, problem.experts_ED, problem.losses["quartic"])


def test_gumbel_draws_by_probability_at_any_temperature() -> None:
    _, noises = estimators._problems(4, Options())
    problem = make_problem(4, 0)
    for name in ("Gumbel, tau 1.0", "Gumbel, tau 0.5"):
        outcomes = ESTIMATORS[name].outcomes(problem.logits_E, noises[0])
        share_E, probs_E = outcomes.weights_OE.detach().mean(0), problem.logits_E.softmax(-1)
        assert ((share_E - probs_E).abs() < 5 * (probs_E * (1 - probs_E) / len(noises[0])).sqrt()).all()


def test_targets_by_finite_differences() -> None:
    problem, eps = make_problem(4, 1), 1e-6
    experts_ED, loss = problem.experts_ED, problem.losses["neural"]

    def values(logits_E: torch.Tensor) -> dict[str, torch.Tensor]:
        probs_E, before_E = logits_E.softmax(-1), problem.logits_E.softmax(-1)
        return {
            "mixture": loss((probs_E @ experts_ED)[None])[0],
            "gated": sum(probs_E[i] * loss(probs_E[i] * experts_ED[i][None])[0] for i in range(4)),
            "held": sum(probs_E[i] * loss(before_E[i] * experts_ED[i][None])[0] for i in range(4)),
            "sampled": sum(probs_E[i] * loss(experts_ED[i][None])[0] for i in range(4)),
        }

    for name, grad_E in targets(problem, loss).items():
        for i in range(4):
            step_E = eps * torch.eye(4, dtype=torch.float64)[i]
            change = values(problem.logits_E + step_E)[name] - values(problem.logits_E - step_E)[name]
            assert change.item() / (2 * eps) == pytest.approx(grad_E[i].item(), rel=1e-5, abs=1e-8)


def test_facts_that_follow_on_paper() -> None:
    # Of a linear loss the difference f(h) - f(0) is half of the gradient, and sampling alone leaves it out.
    assert row("sampled", "linear")["bias"] == pytest.approx(0.5)
    assert row("sampled", "linear")["cosine"] == pytest.approx(1.0)
    # With a linear f' its mean over draws is its value at the mean output: straight-through is exact for the mixture.
    assert row("straight-through", "quadratic")["mixture_bias"] < 1e-12
    assert row("straight-through", "cubic")["mixture_bias"] > 0.05
    assert row("top-1", "neural")["noise"] == 0
    problem = make_problem(4, 0)
    exact = targets(problem, problem.losses["linear"])
    torch.testing.assert_close(2 * exact["held"], exact["gated"])
    torch.testing.assert_close(exact["sampled"], exact["mixture"])


def test_top_1_has_the_exact_gradient_of_what_it_computes() -> None:
    problem = make_problem(4, 0)
    best, loss = int(problem.logits_E.argmax()), problem.losses["neural"]
    leaf_E = problem.logits_E.clone().requires_grad_()
    loss((leaf_E.softmax(-1)[best] * problem.experts_ED[best])[None]).sum().backward()
    found = moments(ESTIMATORS["top-1"].outcomes(problem.logits_E, NONE), problem.experts_ED, loss)
    torch.testing.assert_close(found.mean_E, leaf_E.grad)


@pytest.mark.parametrize("num_experts", [4, 16])
def test_what_the_study_finds(num_experts: int) -> None:
    found = {name: row(name, "neural", num_experts) for name in ESTIMATORS if "Gumbel" not in name}
    for name in ("top-1", "sampled", "straight-through", "straight-through, chosen"):
        assert found[name]["bias"] > 0.2, name
    for name in ("SparseMixer", "SparseMixer-v2", "SparseMixer-v2*"):
        assert found[f"{name}, no argmax rule"]["bias"] < 0.1, name
        assert found[name]["bias"] > 3 * found[f"{name}, no argmax rule"]["bias"], name
    assert found["REINFORCE, baseline"]["noise"] < 0.5 * found["REINFORCE"]["noise"]
