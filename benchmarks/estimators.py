"""``estimators``: how far the router gradient of each method is from the exact one, and how noisy one sample of it is.

One token, E experts with fixed outputs E_i, logits z with p = softmax(z), a loss f of the layer's output. A method minimises
one of these objectives, and "exact" means the gradient of that objective in z, by autograd in fp64:

    mixture  f(sum_i p_i E_i)            every expert runs
    gated    sum_i p_i f(p_i E_i)        one expert is drawn from p and weighted by p_i (eq. 4 of arXiv 2409.12136)
    held     sum_i p_i f(sg(p_i) E_i)    the same, with the weight inside f held constant (eq. 7)
    sampled  sum_i p_i f(E_i)            one expert is drawn and not weighted

Top-1's own objective is f(p_D E_D) with D the best expert, of which it has the exact gradient; it is compared with "gated",
the objective in which the choice of the expert is random and therefore counts. The expectation of every estimator is a
sum over all that it draws, except for Gumbel-softmax, whose noise is continuous: a mean over ``draws`` samples.
SparseMixer's weights come from `moe.routers`, here without its mask (all experts may be drawn), so that p is the same for
all methods.

Columns, over the problems of a row: ``cosine`` is the mean; ``bias`` is the RMS of |E[g] - exact| over the RMS of |exact|;
``noise`` the RMS of |g - E[g]| over the same. ``mixture_cosine`` and ``mixture_bias`` compare with "mixture" whatever the
method minimises. ``error`` is what Monte Carlo adds to the bias. ``experts`` counts the experts that training evaluates.

Legend: E experts, D model, O outcomes of what is drawn, K degree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import pictures
from benchmarks.spec import Benchmark, Cell, Check, Options, Row
from moe.routers.sparsemixer import MIDPOINT, Rule, rule_weights
from moe.routers.sparsemixer_v2 import HEUN, HEUN_CORRECTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIM, HIDDEN, NUM_CLASSES = 8, 16, 10
NUM_EXPERTS = (4, 16)
POLYNOMIALS = ("linear", "quadratic", "cubic", "quartic")
LOSSES = (*POLYNOMIALS, "neural")
EXACT = 1e-10

Loss = Callable[[Tensor], Tensor]  # (O, D) -> (O,)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A token's logits (E,), its experts' outputs (E, D) of RMS 1, and losses of the layer's output, by name."""

    logits_E: Tensor
    experts_ED: Tensor
    losses: dict[str, Loss]


def make_problem(num_experts: int, seed: int) -> Problem:
    """Standard normal logits; random expert MLPs on a random token; polynomials in random directions; a random head."""
    generator = torch.Generator().manual_seed(1000 * num_experts + seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    logits_E = normal(num_experts) * math.sqrt(num_experts)
    x_D = normal(DIM) * math.sqrt(DIM)
    hidden_EF = F.gelu(normal(num_experts, HIDDEN, DIM) @ x_D)
    experts_ED = (normal(num_experts, DIM, HIDDEN) @ hidden_EF[..., None])[..., 0]
    experts_ED = experts_ED / experts_ED.square().mean().sqrt()
    coefs_KD, label = normal(len(POLYNOMIALS), DIM), int(torch.randint(NUM_CLASSES, (), generator=generator))
    first_FD, second_CF = normal(HIDDEN, DIM), 3 * normal(NUM_CLASSES, HIDDEN)

    def polynomial(y_OD: Tensor, degree: int) -> Tensor:
        return 1 + sum((y_OD @ coefs_KD[k]) ** (k + 1) for k in range(degree))

    def neural(y_OD: Tensor) -> Tensor:
        scores_OC = F.gelu((x_D + y_OD) @ first_FD.T) @ second_CF.T
        return -scores_OC.log_softmax(-1)[:, label]

    losses: dict[str, Loss] = {name: partial(polynomial, degree=k + 1) for k, name in enumerate(POLYNOMIALS)}
    return Problem(logits_E=logits_E, experts_ED=experts_ED, losses=losses | {"neural": neural})


def _gradient(problem: Problem, value: Callable[[Tensor], Tensor]) -> Tensor:
    leaf_E = problem.logits_E.clone().requires_grad_()
    (grad_E,) = torch.autograd.grad(value(leaf_E.softmax(-1)), leaf_E)
    return grad_E


def targets(problem: Problem, loss: Loss) -> dict[str, Tensor]:
    """The exact gradient (E,) of each objective."""
    experts_ED = problem.experts_ED
    return {
        "mixture": _gradient(problem, lambda probs_E: loss((probs_E @ experts_ED)[None])[0]),
        "gated": _gradient(problem, lambda probs_E: probs_E @ loss(probs_E[:, None] * experts_ED)),
        "held": _gradient(problem, lambda probs_E: probs_E @ loss(probs_E.detach()[:, None] * experts_ED)),
        "sampled": _gradient(problem, lambda probs_E: probs_E @ loss(experts_ED)),
    }


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """All that an estimator may draw, each with a copy of the logits of its own, so that one backward serves all.

    Attributes:
        logits_OE: leaves.
        weights_OE: combine weights, a function of the logits.
        chances_O: probability of each outcome; a constant.
        scores_O: log-probability of the outcome as a function of the logits, where the score function is used.
        baseline: whether the score is multiplied by the loss minus its expectation.
    """

    logits_OE: Tensor
    weights_OE: Tensor
    chances_O: Tensor
    scores_O: Tensor | None = None
    baseline: bool = False


def _leaf(logits_E: Tensor, num_outcomes: int) -> Tensor:
    return logits_E.detach().repeat(num_outcomes, 1).requires_grad_()


def _dense(logits_E: Tensor, noise_OE: Tensor) -> Outcomes:
    leaf_OE = _leaf(logits_E, 1)
    return Outcomes(logits_OE=leaf_OE, weights_OE=leaf_OE.softmax(-1), chances_O=logits_E.new_ones(1))


def _top_1(logits_E: Tensor, noise_OE: Tensor) -> Outcomes:
    leaf_OE = _leaf(logits_E, 1)
    hot_OE = F.one_hot(logits_E.argmax()[None], len(logits_E))
    return Outcomes(logits_OE=leaf_OE, weights_OE=hot_OE * leaf_OE.softmax(-1), chances_O=logits_E.new_ones(1))


def _sampled(logits_E: Tensor, noise_OE: Tensor, score: bool = False, baseline: bool = False) -> Outcomes:
    """The drawn expert weighted by its probability; ``score`` adds REINFORCE's term."""
    leaf_OE = _leaf(logits_E, len(logits_E))
    log_probs_OE = leaf_OE.log_softmax(-1)
    return Outcomes(
        logits_OE=leaf_OE,
        weights_OE=torch.diag(log_probs_OE.diagonal().exp()),
        chances_O=logits_E.softmax(-1),
        scores_O=log_probs_OE.diagonal() if score else None,
        baseline=baseline,
    )


def _sparsemixer(logits_E: Tensor, noise_OE: Tensor, rule: Rule, argmax_rule: bool) -> Outcomes:
    """First all outcomes with B = 1, then those with B = 0."""
    num_experts = len(logits_E)
    leaf_OE, ids_O = _leaf(logits_E, 2 * num_experts), torch.arange(num_experts).repeat(2)
    full_O = torch.arange(2 * num_experts) < num_experts
    chances_O = torch.where(full_O, rule.full_chance, 1 - rule.full_chance).to(logits_E) * logits_E.softmax(-1)[ids_O]
    if argmax_rule:
        full_O = full_O | (ids_O == logits_E.argmax())
    probs_O = leaf_OE.softmax(-1).gather(1, ids_O[:, None])[:, 0]
    weights_OE = F.one_hot(ids_O, num_experts) * rule_weights(probs_O, full_O, rule)[:, None]
    return Outcomes(logits_OE=leaf_OE, weights_OE=weights_OE, chances_O=chances_O)


def _straight_through(logits_E: Tensor, noise_OE: Tensor, chosen_only: bool) -> Outcomes:
    leaf_OE, hot_OE = _leaf(logits_E, len(logits_E)), torch.eye(len(logits_E), dtype=logits_E.dtype)
    soft_OE = leaf_OE.softmax(-1) * hot_OE if chosen_only else leaf_OE.softmax(-1)
    return Outcomes(logits_OE=leaf_OE, weights_OE=hot_OE + soft_OE - soft_OE.detach(), chances_O=logits_E.softmax(-1))


def _gumbel(logits_E: Tensor, noise_OE: Tensor, tau: float) -> Outcomes:
    leaf_OE = _leaf(logits_E, len(noise_OE))
    soft_OE = ((leaf_OE + noise_OE) / tau).softmax(-1)
    hot_OE = F.one_hot(soft_OE.argmax(-1), len(logits_E))
    chances_O = torch.full_like(noise_OE[:, 0], 1 / len(noise_OE))
    return Outcomes(logits_OE=leaf_OE, weights_OE=hot_OE + soft_OE - soft_OE.detach(), chances_O=chances_O)


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """What to estimate, how, and whether training evaluates all experts for it."""

    target: str
    outcomes: Callable[[Tensor, Tensor], Outcomes]
    all_experts: bool = False
    monte_carlo: bool = False


ESTIMATORS: dict[str, Estimator] = {
    "full mixture": Estimator(target="mixture", outcomes=_dense, all_experts=True),
    "top-1": Estimator(target="gated", outcomes=_top_1),
    "sampled": Estimator(target="gated", outcomes=_sampled),
    "REINFORCE": Estimator(target="gated", outcomes=partial(_sampled, score=True)),
    "REINFORCE, baseline": Estimator(target="gated", outcomes=partial(_sampled, score=True, baseline=True)),
    **{
        name + suffix: Estimator(target=target, outcomes=partial(_sparsemixer, rule=rule, argmax_rule=argmax_rule))
        for name, rule, target in (
            ("SparseMixer", MIDPOINT, "gated"),
            ("SparseMixer-v2", HEUN, "held"),
            ("SparseMixer-v2*", HEUN_CORRECTED, "gated"),
        )
        for suffix, argmax_rule in (("", True), (", no argmax rule", False))
    },
    "straight-through": Estimator(
        target="sampled", outcomes=partial(_straight_through, chosen_only=False), all_experts=True
    ),
    "straight-through, chosen": Estimator(target="sampled", outcomes=partial(_straight_through, chosen_only=True)),
    **{
        f"Gumbel, tau {tau}": Estimator(
            target="sampled", outcomes=partial(_gumbel, tau=tau), all_experts=True, monte_carlo=True
        )
        for tau in (1.0, 0.5)
    },
}


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Expectation (E,) of an estimator's gradient, and the expected squared distance of one sample from it."""

    mean_E: Tensor
    variance: float


def moments(outcomes: Outcomes, experts_ED: Tensor, loss: Loss) -> Moments:
    """Over all outcomes, by one backward: each outcome has its own logits."""
    loss_O = loss(outcomes.weights_OE @ experts_ED)
    surrogate_O = loss_O
    if outcomes.scores_O is not None:
        baseline = outcomes.chances_O @ loss_O.detach() if outcomes.baseline else 0.0
        surrogate_O = loss_O + (loss_O.detach() - baseline) * outcomes.scores_O
    (grad_OE,) = torch.autograd.grad(surrogate_O.sum(), outcomes.logits_OE)
    mean_E = outcomes.chances_O @ grad_OE
    return Moments(mean_E=mean_E, variance=(outcomes.chances_O @ (grad_OE - mean_E).square().sum(-1)).item())


def _rms(values: list[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


def measure(estimator: Estimator, problems: list[Problem], loss_name: str, noises: list[Tensor]) -> Row:
    """The columns of one estimator and one loss, over all problems."""
    found: dict[str, list[float]] = {key: [] for key in ("cosine", "mixture_cosine")}
    distance: dict[str, list[float]] = {key: [] for key in ("bias", "mixture_bias", "noise", "own", "mixture")}
    for problem, noise_OE in zip(problems, noises, strict=True):
        loss = problem.losses[loss_name]
        exact = targets(problem, loss)
        got = moments(estimator.outcomes(problem.logits_E, noise_OE), problem.experts_ED, loss)
        for prefix, target_E in (("", exact[estimator.target]), ("mixture_", exact["mixture"])):
            found[f"{prefix}cosine"].append(F.cosine_similarity(got.mean_E, target_E, dim=0).item())
            distance[f"{prefix}bias"].append((got.mean_E - target_E).norm().item())
        distance["own"].append(exact[estimator.target].norm().item())
        distance["mixture"].append(exact["mixture"].norm().item())
        distance["noise"].append(math.sqrt(got.variance))
    rms = {key: _rms(values) for key, values in distance.items()}
    draws = len(noises[0]) if estimator.monte_carlo else None
    return {
        "cosine": sum(found["cosine"]) / len(problems),
        "bias": rms["bias"] / rms["own"],
        "noise": rms["noise"] / rms["own"],
        "mixture_cosine": sum(found["mixture_cosine"]) / len(problems),
        "mixture_bias": rms["mixture_bias"] / rms["mixture"],
        "draws": draws,
        "error": rms["noise"] / rms["own"] / math.sqrt(draws) if draws else None,
    }


def _problems(num_experts: int, options: Options) -> tuple[list[Problem], list[Tensor]]:
    """The problems, and standard Gumbel noise for each."""
    num_problems, num_draws = (2, 200) if options.quick else (20, 20_000)
    generator = torch.Generator().manual_seed(num_experts)
    uniform = [
        torch.rand(num_draws, num_experts, generator=generator, dtype=torch.float64).clamp_min(1e-300)
        for _ in range(num_problems)
    ]
    return [make_problem(num_experts, seed) for seed in range(num_problems)], [-(-u.log()).log() for u in uniform]


# Which losses the theory says an estimator is exact for.
CONTROLS = {
    "full mixture": LOSSES,
    "REINFORCE": LOSSES,
    "REINFORCE, baseline": LOSSES,
    "SparseMixer": POLYNOMIALS[:1],
    "SparseMixer, no argmax rule": POLYNOMIALS[:2],
    "SparseMixer-v2, no argmax rule": POLYNOMIALS[:3],
    "SparseMixer-v2*, no argmax rule": POLYNOMIALS[:3],
    "straight-through": POLYNOMIALS[:1],
}


def gate(options: Options) -> list[Check]:
    """The controls have no bias against their own objective."""
    checks = []
    for num_experts in NUM_EXPERTS:
        problems, noises = _problems(num_experts, options)
        for name, losses in CONTROLS.items():
            for loss_name in losses:
                bias = float(measure(ESTIMATORS[name], problems, loss_name, noises)["bias"] or 0)
                checks.append(Check(name=f"{name}, {loss_name}, E={num_experts}", error=bias, limit=EXACT))
    return checks


def _rounded(value: Cell) -> Cell:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def run(options: Options) -> list[Row]:
    """One row per estimator, loss and number of experts; and the picture."""
    rows: list[Row] = []
    for num_experts in NUM_EXPERTS:
        problems, noises = _problems(num_experts, options)
        for loss_name in LOSSES:
            for name, estimator in ESTIMATORS.items():
                head: Row = {
                    "part": f"{loss_name}-{num_experts}",
                    "estimator": name,
                    "target": estimator.target,
                    "experts": num_experts if estimator.all_experts else 1,
                    "problems": len(problems),
                }
                found = measure(estimator, problems, loss_name, noises)
                rows.append(head | {key: _rounded(value) for key, value in found.items()})
            options.report(f"{loss_name} loss, {num_experts} experts: {len(ESTIMATORS)} estimators")
    figure = draw(rows)
    if not options.quick:
        options.report(f"drew {pictures.save(figure, 'estimators').name}")
    return rows


PANELS = (
    ("bias", "Bias", "|E[g] - exact| / |exact|, own objective"),
    ("mixture_cosine", "Direction", "cosine of E[g] and the full mixture's"),
    ("noise", "Noise of one sample", "RMS |g - E[g]| / |exact|"),
)
COLORS = {"linear": "#9ecae1", "quadratic": "#5aa5d6", "cubic": "#2171b5", "quartic": "#08306b", "neural": "#d9480f"}
FLOOR = 1e-4  # what is exact is drawn here, under the tick "0"


def _draw_panel(axes: "Axes", rows: list[Row], num_experts: int, key: str) -> None:
    names = list(ESTIMATORS)
    for loss_name, color in COLORS.items():
        found = {row["estimator"]: float(row[key] or 0) for row in rows if row["part"] == f"{loss_name}-{num_experts}"}
        values = [found[name] if key == "mixture_cosine" else max(found[name], FLOOR) for name in names]
        marker = "D" if loss_name == "neural" else "o"
        axes.scatter(values, range(len(names)), s=28, color=color, marker=marker, label=loss_name, zorder=3)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    if key == "mixture_cosine":
        axes.set_xlim(0, 1.03)
        return
    axes.set_xscale("log")
    axes.set_xlim(FLOOR / 2, 40)
    axes.axvspan(FLOOR / 2, FLOOR * 2, color="#eef1f4", zorder=0)
    axes.set_xticks([FLOOR, 1e-2, 0.1, 1, 10], ["0", "0.01", "0.1", "1", "10"])
    axes.minorticks_off()


def draw(rows: list[Row]) -> "Figure":
    """Three panels for each number of experts: a line per estimator, a mark per loss."""
    figure, axes = pictures.figure(11.5, len(NUM_EXPERTS), len(PANELS))
    for index, panel in enumerate(axes):
        key, title, label = PANELS[index % len(PANELS)]
        num_experts = NUM_EXPERTS[index // len(PANELS)]
        _draw_panel(panel, rows, num_experts, key)
        is_first = index % len(PANELS) == 0
        pictures.style(panel, f"{title}, {num_experts} experts" if is_first else title, label)
        panel.tick_params(axis="y", length=0, labelleft=is_first)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS), frameon=False)
    return figure


BENCHMARK = Benchmark(
    name="estimators",
    description="bias, direction and noise of every router gradient estimator against the exact gradient",
    columns=(
        *("part", "estimator", "target", "experts", "problems"),
        *("cosine", "bias", "noise", "mixture_cosine", "mixture_bias", "draws", "error"),
    ),
    table=("estimator", "target", "experts", "cosine", "bias", "noise", "mixture_cosine", "mixture_bias", "error"),
    gate=gate,
    run=run,
)
