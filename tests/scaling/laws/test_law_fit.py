"""Fits of one's own: constants come back, intervals cover them, and runs that determine nothing are refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe.scaling.laws import LAWS, find_law
from moe.scaling.laws.assess import fit_law
from moe.scaling.laws.fit import evaluate, fit, make_problem, solve, starts
from moe.scaling.laws.forms import FORMS, Trained
from moe.scaling.laws.own import OwnLaw, TrainedRun, as_dict, fit_runs, read_runs_csv

CONSTANTS = {
    "chinchilla": LAWS["fine-grained-dense"].constants,
    "fine-grained": LAWS["fine-grained"].constants,
    "joint": LAWS["joint"].constants,
}
NUM_RUNS = {"chinchilla": 25, "fine-grained": 40, "joint": 60}


def trained(num_runs: int, seed: int = 0) -> Trained:
    """Runs over two orders of magnitude."""
    rng = np.random.default_rng(seed)
    return Trained(
        params=np.exp(rng.uniform(np.log(3e7), np.log(3e9), num_runs)),
        tokens=np.exp(rng.uniform(np.log(5e8), np.log(8e10), num_runs)),
        expansion=2.0 ** rng.integers(0, 6, num_runs),
        granularity=2.0 ** rng.integers(0, 5, num_runs),
    )


def noisy_losses(form: str, runs: Trained, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(1000 + seed)
    return FORMS[form].loss(CONSTANTS[form], runs) * np.exp(noise * rng.standard_normal(len(runs)))


def some_runs(num_runs: int = 16, noise: float = 1e-3) -> list[TrainedRun]:
    data = trained(num_runs)
    losses = noisy_losses("chinchilla", data, noise)
    rows = zip(data.params, data.tokens, losses, strict=True)
    return [
        TrainedRun(name=str(i), active=n, total_blocks=3 * n, tokens=d, expansion=4.0, granularity=2.0, loss=loss)
        for i, (n, d, loss) in enumerate(rows)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_exact_losses_give_the_constants_back(form: str) -> None:
    data = trained(NUM_RUNS[form])
    problem = make_problem(FORMS[form], data, noisy_losses(form, data, 0.0), {})
    found = FORMS[form].constants(fit(problem))
    assert found == pytest.approx(CONSTANTS[form], rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_form(form: str) -> None:
    data = trained(7)
    problem = make_problem(FORMS[form], data, noisy_losses(form, data, 0.0), {"c": 0.4})
    theta_P = FORMS[form].theta(CONSTANTS[form])
    jacobian_RF = evaluate(problem, theta_P[None]).jacobian_BRF[0]
    for place, index in enumerate(problem.free):
        step_P = np.zeros_like(theta_P)
        step_P[index] = 1e-6
        ahead, behind = (evaluate(problem, (theta_P + sign * step_P)[None]).log_loss_BR[0] for sign in (1, -1))
        np.testing.assert_allclose(jacobian_RF[:, place], (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9)
    assert "c" not in [FORMS[form].parameters[index] for index in problem.free]


def test_the_form_is_its_formula() -> None:
    """Losses of the three forms, written out."""
    data = Trained(
        params=np.array([2e8]), tokens=np.array([3e9]), expansion=np.array([8.0]), granularity=np.array([4.0])
    )
    c = CONSTANTS["fine-grained"]
    expected = c["c"] + (c["g"] / 4 ** c["gamma"] + c["a"]) / 2e8 ** c["alpha"] + c["b"] / 3e9 ** c["beta"]
    assert FORMS["fine-grained"].loss(c, data)[0] == pytest.approx(expected)
    c = CONSTANTS["chinchilla"]
    expected = c["c"] + c["a"] / 2e8 ** c["alpha"] + c["b"] / 3e9 ** c["beta"]
    assert FORMS["chinchilla"].loss(c, data)[0] == pytest.approx(expected)
    c = CONSTANTS["joint"]
    hat = 1 / (1 / (8 - 1 + 1 / (1 / 2.0732 - 1 / 290.4521)) + 1 / 290.4521)
    expected = c["a"] * hat ** c["delta"] * 2e8 ** (c["alpha"] + c["gamma"] * np.log(hat)) + c["c"]
    expected += c["b"] * hat ** c["omega"] * 3e9 ** (c["beta"] + c["zeta"] * np.log(hat))
    assert FORMS["joint"].loss(c, data)[0] == pytest.approx(expected)


def test_intervals_cover_the_constants() -> None:
    """90 % intervals of noisy fits hold the true constants in about nine of ten: over 3 forms, 21 constants and 8 seeds."""
    covered, number = 0, 0
    for form in FORMS:
        for seed in range(8):
            data = trained(NUM_RUNS[form], seed)
            losses = noisy_losses(form, data, 0.003, seed)
            found = fit_law(form, FORMS[form], data, losses, samples=120, seed=seed)
            for name, value in CONSTANTS[form].items():
                covered += found.intervals[name].low <= value <= found.intervals[name].high
                number += 1
            assert found.rmse == pytest.approx(0.003, rel=0.5)
            assert found.rmse < found.left_out_rmse < 0.006
    # constants of one fit rise and fall together, so this is a mean of some 24 to 50 independent ones
    assert 0.8 <= covered / number <= 0.99


def test_outliers_hardly_move_a_fit() -> None:
    data = trained(30)
    losses = noisy_losses("chinchilla", data, 0.002)
    spoilt = losses.copy()
    spoilt[[3, 17]] *= 1.3
    clean, robust, square = (
        fit_law("chinchilla", FORMS["chinchilla"], data, values, samples=20, huber=huber)
        for values, huber in ((losses, 0.01), (spoilt, 0.01), (spoilt, 1e3))
    )
    held_out = trained(50, seed=9)
    exact = FORMS["chinchilla"].loss(CONSTANTS["chinchilla"], held_out)

    def error(constants: dict[str, float]) -> float:
        return float(np.abs(np.log(FORMS["chinchilla"].loss(constants, held_out) / exact)).mean())

    assert error(robust.constants) < 0.3 * error(square.constants)
    assert error(robust.constants) < error(clean.constants) + 0.004
    assert any("2 runs are off" in warning for warning in robust.warnings)
    assert not any("off by more" in warning for warning in clean.warnings)


def test_held_constants_stay_and_the_rest_is_fitted() -> None:
    data = trained(25)
    losses = noisy_losses("chinchilla", data, 0.001)
    held = {"c": CONSTANTS["chinchilla"]["c"], "beta": CONSTANTS["chinchilla"]["beta"]}
    found = fit_law("chinchilla", FORMS["chinchilla"], data, losses, held, samples=50)
    assert {name: found.constants[name] for name in held} == pytest.approx(held, rel=1e-12)
    assert found.held == ("c", "beta") and found.intervals.keys() == {"a", "alpha", "b"}
    assert found.constants["alpha"] == pytest.approx(CONSTANTS["chinchilla"]["alpha"], rel=0.02)


def test_a_left_out_run_has_no_say() -> None:
    """Its own loss does not change what the others predict for it."""
    data = trained(12)
    losses = noisy_losses("chinchilla", data, 0.002)
    changed = losses.copy()
    changed[4] *= 1.02
    before, after = (
        fit_law("chinchilla", FORMS["chinchilla"], data, values, samples=20).left_out for values in (losses, changed)
    )
    assert after[4] == pytest.approx(before[4], rel=1e-6)
    assert after[5] != pytest.approx(before[5], rel=1e-6)


def test_all_starts_are_no_better_than_the_fit() -> None:
    data = trained(30)
    problem = make_problem(FORMS["chinchilla"], data, noisy_losses("chinchilla", data, 0.005), {})
    best = fit(problem)
    near = starts(problem)[:1] * 0 + best + np.random.default_rng(0).normal(0, 0.02, (20, len(best)))
    found = solve(problem, near, np.ones((20, 30)), problem.log_loss_R[None])
    np.testing.assert_allclose(found, np.tile(best, (20, 1)), rtol=2e-3)


def test_runs_that_determine_nothing_are_refused() -> None:
    form, data = FORMS["joint"], trained(30)
    same = replace(data, expansion=np.full(30, 8.0))
    losses = noisy_losses("joint", same, 0.001)
    with pytest.raises(ValueError, match=r"do not determine .*delta.*1 different expansion rates"):
        fit_law("joint", form, same, losses, samples=20)
    held = {name: CONSTANTS["joint"][name] for name in ("delta", "gamma", "omega", "zeta")}
    assert fit_law("joint", form, same, losses, held, samples=20).rmse < 0.002
    two = replace(data, tokens=np.where(np.arange(30) % 2, 1e9, 1e10))
    with pytest.raises(ValueError, match=r"determine b, beta, c: they have 2 different numbers of tokens"):
        fit_law("chinchilla", FORMS["chinchilla"], two, noisy_losses("chinchilla", two, 0.001), samples=20)
    with pytest.raises(ValueError, match="5 runs are too few for the 5 free parameters of chinchilla: give at least 6"):
        fit_law("chinchilla", FORMS["chinchilla"], trained(5), noisy_losses("chinchilla", trained(5), 0.0), samples=20)
    with pytest.raises(ValueError, match="--hold zeta=1: the form has no such parameter"):
        fit_law("chinchilla", FORMS["chinchilla"], data, losses, {"zeta": 1.0}, samples=20)


def test_what_is_hardly_determined_is_said() -> None:
    data = trained(8)
    found = fit_law("chinchilla", FORMS["chinchilla"], data, noisy_losses("chinchilla", data, 0.02), samples=100)
    assert any("8 runs for 5 free parameters" in warning for warning in found.warnings)
    assert any("hardly determined" in warning for warning in found.warnings)


def test_own_law_counts_as_its_form_and_comes_back_from_its_file(tmp_path: Path) -> None:
    runs = some_runs()
    own = fit_runs(runs, "chinchilla", samples=30)
    file = tmp_path / "law.json"
    file.write_text(json.dumps(as_dict(own)))
    law = find_law(str(file))
    assert law.expansions == (4.0,) and law.granularities == (2.0,) and law.counted == "active"
    size = law.size(2e8, 4, 2, 1000, with_embedding=True)
    assert law.loss(size, 3e9) == own.law.loss(size, 3e9)
    assert law.fitted["tokens"].high == max(run.tokens for run in runs)
    with pytest.raises(ValueError, match="expansion rate 4, and 8"):
        law.size(2e8, 8, 2, 1000, with_embedding=True)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"is no file of `moe laws fit --out`"):
        find_law(str(file))


def test_the_fine_grained_form_counts_all_parameters_of_the_blocks() -> None:
    data, form = trained(40), "fine-grained"
    losses = noisy_losses(form, data, 0.0)
    rows = zip(data.params, data.tokens, data.granularity, losses, strict=True)
    runs = [
        TrainedRun(name=str(i), active=n / 5, total_blocks=n, tokens=d, expansion=64.0, granularity=g, loss=loss)
        for i, (n, d, g, loss) in enumerate(rows)
    ]
    own: OwnLaw = fit_runs(runs, form, samples=20)
    assert own.law.constants == pytest.approx(CONSTANTS[form], rel=1e-5)
    mixed = [replace(run, expansion=64.0 + index % 2) for index, run in enumerate(runs)]
    assert any(
        "several values of expansion" in warning for warning in fit_runs(mixed, form, samples=20).fitted.warnings
    )


def test_csv_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    header = "name,active,total_blocks,tokens,expansion,granularity,loss\n"
    path.write_text(header + "a,1e8,2e8,1e9,1,1,3.2\n")
    assert read_runs_csv(path) == [
        TrainedRun(name="a", active=1e8, total_blocks=2e8, tokens=1e9, expansion=1, granularity=1, loss=3.2)
    ]
    path.write_text(header + "a,1e8,2e8,much,1,1,3.2\n")
    with pytest.raises(ValueError, match="line 2: tokens='much' is no number"):
        read_runs_csv(path)
    path.write_text(header + "a,1e8,2e8,-1,1,1,3.2\n")
    with pytest.raises(ValueError, match="tokens=-1 must be positive"):
        read_runs_csv(path)
    path.write_text("name,active\n")
    with pytest.raises(ValueError, match="has no column total_blocks, tokens"):
        read_runs_csv(path)
