"""Functional forms of scaling laws: the logarithm of the loss is a log-sum-exp of terms that are linear in the parameters.

With positive amplitudes written as logarithms, every form below is L = sum_k exp(X_k . theta), where X_k depends on what was
trained only. So one function evaluates all forms, their gradient is a softmax-weighted mean of X, and a fit is as stable as
arXiv 2502.05172 appendix B asks for.

Legend: R runs, K terms, P parameters, B parameter vectors side by side.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Of the transformed number of experts, arXiv 2502.05172 table 3. Fits of one's own keep them: two more numbers that bend the
# same curve cannot be told from the exponents with few values of E.
EXPANSION_START, EXPANSION_MAX = 2.0732, 290.4521


def transformed_expansion(expansion: Floats | float) -> Floats:
    """E-hat of arXiv 2502.05172 eq. 4 (from arXiv 2202.01169): near E_start at E = 1, saturates at E_max."""
    start = 1 / (1 / EXPANSION_START - 1 / EXPANSION_MAX)
    return np.asarray(1 / (1 / (np.asarray(expansion, dtype=np.float64) - 1 + start) + 1 / EXPANSION_MAX))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the loss of R trainings depends on; (R,) each.

    Attributes:
        params: N, counted as the law says.
        tokens: D.
        expansion: E.
        granularity: G.
    """

    params: Floats
    tokens: Floats
    expansion: Floats
    granularity: Floats

    def __len__(self) -> int:
        return len(self.params)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A family of laws.

    Attributes:
        formula: for people.
        parameters: names in the order of theta.
        amplitudes: those of them that are positive, and logarithms in theta; term k's is the k-th.
        starts: values of each other parameter from which a fit starts; every combination is tried.
        terms: (R, K, P) linear coefficients.
    """

    formula: str
    parameters: tuple[str, ...]
    amplitudes: tuple[str, ...]
    starts: Mapping[str, tuple[float, ...]]
    terms: Callable[[Trained], Floats]

    def theta(self, constants: Mapping[str, float]) -> Floats:
        """(P,) from named constants."""
        return np.array(
            [np.log(constants[name]) if name in self.amplitudes else constants[name] for name in self.parameters]
        )

    def constants(self, theta_P: Floats) -> dict[str, float]:
        """Named constants from (P,)."""
        pairs = zip(self.parameters, theta_P, strict=True)
        return {name: float(np.exp(value) if name in self.amplitudes else value) for name, value in pairs}

    def loss(self, constants: Mapping[str, float], trained: Trained) -> Floats:
        """(R,) losses in nats per token."""
        return np.asarray(np.exp(log_sum_exp(self.terms(trained) @ self.theta(constants))))


def log_sum_exp(values: Floats) -> Floats:
    """Over the last axis."""
    highest = values.max(axis=-1, keepdims=True)
    return np.asarray(np.log(np.exp(values - highest).sum(axis=-1)) + highest[..., 0])


def _chinchilla(trained: Trained) -> Floats:
    one, zero = np.ones(len(trained)), np.zeros(len(trained))
    log_n, log_d = np.log(trained.params), np.log(trained.tokens)
    # a, alpha, b, beta, c
    return _stack(
        [one, -log_n, zero, zero, zero],
        [zero, zero, one, -log_d, zero],
        [zero, zero, zero, zero, one],
    )


def _fine_grained(trained: Trained) -> Floats:
    one, zero = np.ones(len(trained)), np.zeros(len(trained))
    log_n, log_d, log_g = np.log(trained.params), np.log(trained.tokens), np.log(trained.granularity)
    # a, alpha, b, beta, c, g, gamma
    return _stack(
        [one, -log_n, zero, zero, zero, zero, zero],
        [zero, zero, one, -log_d, zero, zero, zero],
        [zero, zero, zero, zero, one, zero, zero],
        [zero, -log_n, zero, zero, zero, one, -log_g],
    )


def _joint(trained: Trained) -> Floats:
    one, zero = np.ones(len(trained)), np.zeros(len(trained))
    log_n, log_d = np.log(trained.params), np.log(trained.tokens)
    log_e = np.log(transformed_expansion(trained.expansion))
    # a, alpha, delta, gamma, b, beta, omega, zeta, c
    return _stack(
        [one, log_n, log_e, log_e * log_n, zero, zero, zero, zero, zero],
        [zero, zero, zero, zero, one, log_d, log_e, log_e * log_d, zero],
        [zero, zero, zero, zero, zero, zero, zero, zero, one],
    )


def _stack(*terms: list[Floats]) -> Floats:
    return np.stack([np.stack(term, axis=-1) for term in terms], axis=1)


FORMS: dict[str, Form] = {
    "chinchilla": Form(
        formula="L = c + a / N^alpha + b / D^beta",
        parameters=("a", "alpha", "b", "beta", "c"),
        amplitudes=("a", "b", "c"),
        starts={"alpha": (0.1, 0.3, 0.6), "beta": (0.1, 0.3, 0.6)},
        terms=_chinchilla,
    ),
    "fine-grained": Form(
        formula="L = c + (g / G^gamma + a) / N^alpha + b / D^beta",
        parameters=("a", "alpha", "b", "beta", "c", "g", "gamma"),
        amplitudes=("a", "b", "c", "g"),
        starts={"alpha": (0.1, 0.3, 0.6), "beta": (0.1, 0.3, 0.6), "gamma": (0.3, 1.0)},
        terms=_fine_grained,
    ),
    "joint": Form(
        formula="L = a Eh^delta N^(alpha + gamma ln Eh) + b Eh^omega D^(beta + zeta ln Eh) + c, Eh = E-hat(E)",
        parameters=("a", "alpha", "delta", "gamma", "b", "beta", "omega", "zeta", "c"),
        amplitudes=("a", "b", "c"),
        starts={
            "alpha": (-0.1, -0.3, -0.6),
            "beta": (-0.1, -0.3, -0.6),
            "delta": (0.0,),
            "gamma": (0.0,),
            "omega": (0.0,),
            "zeta": (0.0,),
        },
        terms=_joint,
    ),
}
