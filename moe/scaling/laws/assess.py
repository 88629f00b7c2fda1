"""How far a fitted law can be trusted: what the runs determine, intervals by bootstrap, errors on runs that were left out.

Legend: R runs, P parameters, F free parameters, B bootstrap samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe.scaling.laws.fit import HUBER, Problem, evaluate, fit, make_problem, solve
from moe.scaling.laws.forms import Floats, Form, Trained

CONFIDENCE = 0.9
_DEPENDENT = 1e-7  # singular value over the largest, of unit columns, below which parameters cannot be told apart
_FREE_FACTOR = 10.0  # an amplitude whose interval spans more than this factor is hardly determined
_HELD_OUT = 0.2  # share of the runs, those of the lowest loss, that the extrapolation test leaves out


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Percentiles of the bootstrap."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class FittedLaw:
    """A form fitted to runs.

    Attributes:
        form: its name in `FORMS`.
        constants: fitted, and those held.
        held: names of constants that were given.
        intervals: of the fitted constants, at `CONFIDENCE`.
        rmse: of log-residuals, so relative errors of the loss, with as many degrees of freedom as parameters taken off.
        left_out_rmse: the same of each run predicted from all others.
        extrapolation_rmse: of the runs with the lowest loss, predicted from the rest; None where the rest is too few.
        predicted: (R,) losses by the law; left_out: (R,) losses each predicted from the other runs.
        warnings: what a reader must know before using it.
    """

    form: str
    constants: Mapping[str, float]
    held: tuple[str, ...]
    intervals: Mapping[str, Interval]
    rmse: float
    left_out_rmse: float
    extrapolation_rmse: float | None
    predicted: tuple[float, ...]
    left_out: tuple[float, ...]
    warnings: tuple[str, ...]


def fit_law(
    name: str,
    form: Form,
    trained: Trained,
    losses: Floats,
    held: Mapping[str, float] | None = None,
    *,
    samples: int = 400,
    seed: int = 0,
    huber: float = HUBER,
) -> FittedLaw:
    """Fit a law and say how well.

    Args:
        name: of the form in `FORMS`.
        form: that form.
        trained: what the losses depend on.
        losses: (R,) in nats per token.
        held: constants that stay as given.
        samples: B.
        seed: of the bootstrap.
        huber: log-residual from which the loss is linear.

    Raises:
        ValueError: too few runs, or runs that do not determine the parameters; names them.
    """
    problem = make_problem(form, trained, losses, held or {})
    num_free, num_runs = len(problem.free), len(losses)
    if not num_free:
        raise ValueError("--hold holds every parameter of the form: there is nothing to fit")
    if num_runs <= num_free:
        raise ValueError(
            f"{num_runs} runs are too few for the {num_free} free parameters of {name}: give at least {num_free + 1}, hold some "
            "with --hold NAME=VALUE, or choose a --form with fewer"
        )
    theta_P = fit(problem, huber)
    found = evaluate(problem, theta_P[None])
    _check_determined(problem, trained, found.jacobian_BRF[0])
    residual_R = problem.log_loss_R - found.log_loss_BR[0]
    left_out_R = _leave_one_out(problem, theta_P, huber)
    intervals = _bootstrap(problem, theta_P, residual_R, found.jacobian_BRF[0], samples, seed, huber)
    return FittedLaw(
        form=name,
        constants=form.constants(theta_P),
        held=tuple(problem.held),
        intervals=intervals,
        rmse=float(np.sqrt((residual_R**2).sum() / (num_runs - num_free))),
        left_out_rmse=float(np.sqrt(((problem.log_loss_R - left_out_R) ** 2).mean())),
        extrapolation_rmse=_extrapolation(problem, huber),
        predicted=tuple(np.exp(found.log_loss_BR[0]).tolist()),
        left_out=tuple(np.exp(left_out_R).tolist()),
        warnings=tuple(_warnings(problem, intervals, residual_R, huber)),
    )


def _check_determined(problem: Problem, trained: Trained, jacobian_RF: Floats) -> None:
    """Refuse runs in which parameters only occur together: a direction of theta that changes no prediction."""
    scale_F = np.maximum(np.linalg.norm(jacobian_RF, axis=0), 1e-300)
    _, singular, directions = np.linalg.svd(jacobian_RF / scale_F, full_matrices=False)
    loose = directions[singular < _DEPENDENT * singular[0]]
    if not len(loose):
        return
    share_F = np.linalg.norm(loose, axis=0)
    names = [problem.form.parameters[index] for index, share in zip(problem.free, share_F, strict=True) if share > 0.05]
    few = [
        f"{len(np.unique(values))} different {what}"
        for what, values in (
            ("sizes", trained.params),
            ("numbers of tokens", trained.tokens),
            ("expansion rates", trained.expansion),
            ("granularities", trained.granularity),
        )
        if len(np.unique(values)) < 3
    ]
    reason = f": they have {', '.join(few)}" if few else ""
    raise ValueError(
        f"these runs do not determine {', '.join(names)}{reason}. Add runs that vary what is missing, hold parameters with "
        "--hold NAME=VALUE, or choose a --form without them"
    )


def _leave_one_out(problem: Problem, theta_P: Floats, huber: float) -> Floats:
    """(R,) predicted logarithms of the loss, each by a fit to the other runs."""
    num_runs = len(problem.log_loss_R)
    weights_RR = 1.0 - np.eye(num_runs)
    theta_RP = solve(problem, np.tile(theta_P, (num_runs, 1)), weights_RR, problem.log_loss_R[None], huber)
    return np.asarray(np.diagonal(evaluate(problem, theta_RP).log_loss_BR).copy())


def _extrapolation(problem: Problem, huber: float) -> float | None:
    order = np.argsort(problem.log_loss_R)
    num_out = max(round(_HELD_OUT * len(order)), 1)
    kept, out = order[num_out:], order[:num_out]
    if len(kept) <= len(problem.free):
        return None
    part = Problem(
        form=problem.form, held=problem.held, terms_RKP=problem.terms_RKP[kept], log_loss_R=problem.log_loss_R[kept]
    )
    predicted_R = evaluate(problem, fit(part, huber)[None]).log_loss_BR[0]
    return float(np.sqrt(((problem.log_loss_R - predicted_R)[out] ** 2).mean()))


def _bootstrap(
    problem: Problem, theta_P: Floats, residual_R: Floats, jacobian_RF: Floats, samples: int, seed: int, huber: float
) -> dict[str, Interval]:
    """Percentiles over fits to predictions plus residuals drawn again (the design stays as it is: few runs survive no resampling).

    A residual is smaller than the noise by the run's leverage h, so it is divided by sqrt(1 - h) and centred (Davison and
    Hinkley, Bootstrap Methods, section 6.2).
    """
    form, num_runs = problem.form, len(residual_R)
    basis_RF, _ = np.linalg.qr(jacobian_RF / np.linalg.norm(jacobian_RF, axis=0))
    leverage_R = (basis_RF**2).sum(axis=1).clip(max=1 - 1e-6)
    noise_R = residual_R / np.sqrt(1 - leverage_R)
    noise_R -= noise_R.mean()
    drawn_BR = noise_R[np.random.default_rng(seed).integers(0, num_runs, (samples, num_runs))]
    log_loss_BR = problem.log_loss_R - residual_R + drawn_BR
    weights_BR = np.ones((samples, num_runs))
    theta_BP = solve(problem, np.tile(theta_P, (samples, 1)), weights_BR, log_loss_BR, huber)
    outside = (1 - CONFIDENCE) / 2
    low_P, high_P = np.quantile(theta_BP, [outside, 1 - outside], axis=0)
    lows, highs = form.constants(low_P), form.constants(high_P)
    free = [form.parameters[index] for index in problem.free]
    return {name: Interval(low=lows[name], high=highs[name]) for name in free}


def _warnings(problem: Problem, intervals: Mapping[str, Interval], residual_R: Floats, huber: float) -> list[str]:
    found = []
    num_runs, num_free = len(residual_R), len(problem.free)
    if num_runs < 2 * num_free:
        found.append(
            f"{num_runs} runs for {num_free} free parameters: at least {2 * num_free} make the errors meaningful"
        )
    for name, interval in intervals.items():
        if name in problem.form.amplitudes:
            if interval.high > _FREE_FACTOR * interval.low:
                found.append(f"{name} is hardly determined: {interval.low:.3g} to {interval.high:.3g}")
        elif interval.low <= 0 <= interval.high:
            found.append(f"the sign of {name} is not determined: {interval.low:.3g} to {interval.high:.3g}")
    outliers = int((np.abs(residual_R) > 3 * huber).sum())
    if outliers:
        found.append(f"{outliers} runs are off by more than {3 * huber:.0%} and count little; look at them")
    return found
