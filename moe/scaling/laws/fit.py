"""Fitting a law: robust least squares on the logarithm of the loss, many problems side by side.

The objective is that of Hoffmann et al. (arXiv 2203.15556 appendix D.3) and arXiv 2502.05172: the Huber loss of log-residuals
under a log-sum-exp form, from a grid of starts. It is minimised by Levenberg-Marquardt with Huber's weights and not by L-BFGS:
the gradient of these forms is known in closed form, the valleys are long and flat, and starts, bootstrap samples and left-out
runs are all solved in one batch.

Legend: R runs, K terms, P parameters, F parameters that are free, B problems side by side.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe.scaling.laws.forms import Floats, Form, Trained

HUBER = 0.01  # log-residuals beyond this count linearly; arXiv 2502.05172 appendix B
_AMPLITUDES = (-12.0, 60.0)  # of their logarithms: below, a term is nothing beside a loss
_MAX_STEPS = 400
_TOLERANCE = 1e-11  # relative fall of the objective in a step
_MOST_DAMPING = 1e10


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A form to be fitted to R runs.

    Attributes:
        form: what to fit.
        held: constants that stay as given.
        terms_RKP: of the form.
        log_loss_R: logarithms of the measured losses.
    """

    form: Form
    held: Mapping[str, float]
    terms_RKP: Floats
    log_loss_R: Floats

    @property
    def free(self) -> list[int]:
        """Indices of the parameters that are fitted."""
        return [index for index, name in enumerate(self.form.parameters) if name not in self.held]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """B parameter vectors evaluated on all runs.

    Attributes:
        log_loss_BR: predicted logarithms of the loss.
        jacobian_BRF: their derivatives by the free parameters.
    """

    log_loss_BR: Floats
    jacobian_BRF: Floats


def make_problem(form: Form, trained: Trained, losses: Floats, held: Mapping[str, float]) -> Problem:
    """A problem.

    Args:
        form: what to fit.
        trained: (R,) each.
        losses: (R,) in nats per token.
        held: constants that stay as given.

    Raises:
        ValueError: an unknown or impossible held constant, or a loss that is not positive.
    """
    for name, value in held.items():
        if name not in form.parameters:
            raise ValueError(
                f"--hold {name}={value:g}: the form has no such parameter; it has {', '.join(form.parameters)}"
            )
        if name in form.amplitudes and value <= 0:
            raise ValueError(f"--hold {name}={value:g} must be positive")
    if not (losses > 0).all():
        raise ValueError(f"losses must be positive, and the smallest is {losses.min():g}")
    return Problem(form=form, held=dict(held), terms_RKP=form.terms(trained), log_loss_R=np.log(losses))


def evaluate(problem: Problem, theta_BP: Floats) -> Evaluated:
    """Predictions and their gradients."""
    values_BRK = np.moveaxis(problem.terms_RKP @ theta_BP.T, -1, 0)
    highest_BR1 = values_BRK.max(axis=-1, keepdims=True)
    shares_BRK = np.exp(values_BRK - highest_BR1)
    total_BR1 = shares_BRK.sum(axis=-1, keepdims=True)
    shares_BRK /= total_BR1
    terms_RKF = problem.terms_RKP[:, :, problem.free]
    jacobian_RBF = np.swapaxes(shares_BRK, 0, 1) @ terms_RKF
    return Evaluated(
        log_loss_BR=(np.log(total_BR1) + highest_BR1)[..., 0], jacobian_BRF=np.swapaxes(jacobian_RBF, 0, 1)
    )


def solve(problem: Problem, theta_BP: Floats, weights_BR: Floats, log_loss_BR: Floats, huber: float = HUBER) -> Floats:
    """Minimise the weighted Huber loss of log-residuals from B starts.

    Args:
        problem: what is fitted.
        theta_BP: starts; held parameters are overwritten.
        weights_BR: of the runs; 0 leaves a run out.
        log_loss_BR: what is fitted to; (1, R) for the same everywhere.
        huber: log-residual from which the loss is linear.

    Returns:
        (B, P) parameters.
    """
    form, free = problem.form, problem.free
    theta_BP = np.array(theta_BP, dtype=np.float64)
    for name, value in problem.held.items():
        theta_BP[:, form.parameters.index(name)] = np.log(value) if name in form.amplitudes else value
    amplitudes = [form.parameters.index(name) for name in form.amplitudes]
    log_loss_BR = np.broadcast_to(log_loss_BR, weights_BR.shape)
    solved_BP, going_B = theta_BP.copy(), np.arange(len(theta_BP))
    damping_B = np.full(len(theta_BP), 1e-2)
    found = evaluate(problem, theta_BP)
    cost_B = _cost(log_loss_BR - found.log_loss_BR, weights_BR, huber)
    for _ in range(_MAX_STEPS):
        residual_BR = log_loss_BR - found.log_loss_BR
        robust_BR = weights_BR * np.minimum(1.0, huber / np.maximum(np.abs(residual_BR), 1e-300))
        weighted_BFR = np.swapaxes(robust_BR[..., None] * found.jacobian_BRF, 1, 2)
        normal_BFF = weighted_BFR @ found.jacobian_BRF
        scale_BF = np.einsum("bff->bf", normal_BFF)
        scale_BF = np.maximum(scale_BF, 1e-12 * scale_BF.max(axis=-1, keepdims=True) + 1e-300)
        normal_BFF[:, range(len(free)), range(len(free))] += damping_B[:, None] * scale_BF
        tried_BP = theta_BP.copy()
        tried_BP[:, free] += np.linalg.solve(normal_BFF, weighted_BFR @ residual_BR[..., None])[..., 0]
        tried_BP[:, amplitudes] = tried_BP[:, amplitudes].clip(*_AMPLITUDES)
        tried = evaluate(problem, tried_BP)
        tried_cost_B = _cost(log_loss_BR - tried.log_loss_BR, weights_BR, huber)
        better_B = tried_cost_B < cost_B
        ended_B = np.where(better_B, cost_B - tried_cost_B < _TOLERANCE * cost_B, damping_B > _MOST_DAMPING)
        theta_BP = np.where(better_B[:, None], tried_BP, theta_BP)
        solved_BP[going_B] = theta_BP
        if ended_B.all():
            break
        found = Evaluated(
            log_loss_BR=np.where(better_B[:, None], tried.log_loss_BR, found.log_loss_BR)[~ended_B],
            jacobian_BRF=np.where(better_B[:, None, None], tried.jacobian_BRF, found.jacobian_BRF)[~ended_B],
        )
        cost_B = np.where(better_B, tried_cost_B, cost_B)[~ended_B]
        damping_B = np.maximum(np.where(better_B, damping_B / 4, damping_B * 6), 1e-15)[~ended_B]
        theta_BP, weights_BR, log_loss_BR = theta_BP[~ended_B], weights_BR[~ended_B], log_loss_BR[~ended_B]
        going_B = going_B[~ended_B]
    return solved_BP


def _cost(residual_BR: Floats, weights_BR: Floats, huber: float) -> Floats:
    size_BR = np.abs(residual_BR)
    cost_BR = np.where(size_BR <= huber, size_BR**2 / 2, huber * (size_BR - huber / 2))
    return np.asarray((weights_BR * cost_BR).sum(axis=-1))


def starts(problem: Problem) -> Floats:
    """(B, P) starting points: the form's grid of exponents, floors of 0.1 and 0.5 of the least loss, other terms equal."""
    form = problem.form
    names = list(form.starts)
    middle_KP = problem.terms_RKP.mean(axis=0)
    least, mean = np.exp(problem.log_loss_R.min()), np.exp(problem.log_loss_R.mean())
    found = []
    for floor in (0.1, 0.5):
        for values in itertools.product(*form.starts.values()):
            theta_P = np.zeros(len(form.parameters))
            for name, value in zip(names, values, strict=True):
                theta_P[form.parameters.index(name)] = value
            others = [name for name in form.amplitudes if name != "c"]
            rest = (mean - floor * least) / len(others)
            theta_P[form.parameters.index("c")] = np.log(floor * least)
            for name in others:
                place = form.parameters.index(name)
                term = int(np.argmax(middle_KP[:, place]))  # the one that holds this amplitude
                theta_P[place] = np.log(rest) - middle_KP[term] @ theta_P
            found.append(theta_P)
    return np.stack(found)


def fit(problem: Problem, huber: float = HUBER) -> Floats:
    """(P,) parameters with the least Huber loss over all starts."""
    starts_BP = starts(problem)
    weights_BR = np.ones((len(starts_BP), len(problem.log_loss_R)))
    theta_BP = solve(problem, starts_BP, weights_BR, problem.log_loss_R[None], huber)
    residual_BR = problem.log_loss_R[None] - evaluate(problem, theta_BP).log_loss_BR
    return np.asarray(theta_BP[np.argmin(_cost(residual_BR, weights_BR, huber))])
