"""Part ``multitask``: which experts does a gate find? Regression tasks that are known sparse mixtures of shared experts.

In the manner of the synthetic study of DSelect-k (Hazimeh et al. 2021, arXiv 2106.03760), whose data is not public: 16 tasks on
the same inputs, each the convex combination of two of eight random networks, plus noise. The gate sees which task it is, and
nothing else: every router routes the 16 one-hot vectors of the tasks, so that a linear gate is what that paper calls static,
one free vector per task. Two cases:

- ``known``: the experts are the true ones, only the gates are learned. Is the selection found?
- ``learned``: experts (twice as wide as the true ones) and gates are learned together. Learned experts have no order, so that
  they are matched with the true ones by the assignment that recovers most.

Each router takes the learning rate of the grid with the lowest loss on a seed that is not reported. An expert is in a task's
support when its weight is above 5% of the task's total, in evaluation. The mean squared error is against targets without noise,
whose variance is about 1 for a single expert.

Legend: M tasks, E experts, T inputs, D their size, F hidden units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.routers.combine import evaluations, finish_step, own_losses, weight_matrix
from benchmarks.routers.protocol import TUNING_SEED, listed, mean, run_all, spread
from benchmarks.routers.settings import MULTITASK, NUM_EXPERTS, TOP_K, GateSetting
from benchmarks.spec import Check, Options, Row
from moe.routers import parse_router
from moe.types import TokenInfo

NUM_TASKS, DIM, HIDDEN = 16, 10, 8
NOISE, SHARE = 0.1, 0.05
STEPS, NUM_TRAIN, NUM_TEST, BATCH = 1000, 500, 2000, 100
RATES = (0.003, 0.01, 0.03)
SEEDS = (0, 1, 2, 3, 4)
CASES = ("known", "learned")


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Inputs, the true experts' outputs on them, and the tasks' true weights and noisy training targets."""

    x_TD: Tensor
    experts_ET: Tensor
    weights_ME: Tensor
    targets_MT: Tensor


class Networks(nn.Module):
    """E networks from D inputs to one number, with F hidden units each."""

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.up_EDF = nn.Parameter(2 * torch.randn(NUM_EXPERTS, DIM, hidden, generator=generator) / DIM**0.5)
        self.bias_EF = nn.Parameter(torch.randn(NUM_EXPERTS, hidden, generator=generator))
        self.down_EF = nn.Parameter(torch.randn(NUM_EXPERTS, hidden, generator=generator) / hidden**0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (E, T)."""
        h_ETF = (x_TD @ self.up_EDF + self.bias_EF[:, None]).relu()
        return (h_ETF @ self.down_EF[..., None])[..., 0]


@torch.no_grad()
def make_tasks(seed: int) -> Tasks:
    """True experts have mean 0 and variance 1 over the inputs; weights are U(0.3, 0.7) and the rest."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(NUM_TRAIN + NUM_TEST, DIM, generator=generator)
    experts_ET = Networks(HIDDEN, generator)(x_TD)
    experts_ET = (experts_ET - experts_ET.mean(1, keepdim=True)) / experts_ET.std(1, keepdim=True)
    support_MK = torch.rand(NUM_TASKS, NUM_EXPERTS, generator=generator).topk(TOP_K, 1).indices
    first_M1 = 0.3 + 0.4 * torch.rand(NUM_TASKS, 1, generator=generator)
    weights_ME = torch.zeros(NUM_TASKS, NUM_EXPERTS).scatter(1, support_MK, torch.cat([first_M1, 1 - first_M1], 1))
    targets_MT = weights_ME @ experts_ET
    noise_MT = NOISE * torch.randn(targets_MT.shape, generator=generator)
    return Tasks(x_TD=x_TD, experts_ET=experts_ET, weights_ME=weights_ME, targets_MT=targets_MT + noise_MT)


def best_order(found_ME: Tensor, true_ME: Tensor) -> Tensor:
    """(E,) the found expert that stands for each true one, by the assignment with the largest overlap of supports."""
    from scipy.optimize import linear_sum_assignment

    overlap_EE = true_ME.float().T @ found_ME.float()
    return torch.as_tensor(linear_sum_assignment(overlap_EE.numpy(), maximize=True)[1])


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How well supports are recovered: F1 over all pairs of task and expert, and the share of tasks that are exact."""

    f1: float
    exact: float


def recovery(found_ME: Tensor, true_ME: Tensor) -> Recovery:
    """Of two bool matrices."""
    both = int((found_ME & true_ME).sum())
    f1 = 2 * both / max(int(found_ME.sum()) + int(true_ME.sum()), 1)
    return Recovery(f1=f1, exact=(found_ME == true_ME).all(1).float().mean().item())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: mean squared error of the test inputs, recovery, experts per task in evaluation and in training."""

    loss: float
    found: Recovery
    support: float
    used: float


def train(setting: GateSetting, case: str, rate: float, seed: int, steps: int) -> Outcome:
    """Adam on the gate and, where they are learned, the experts."""
    tasks = make_tasks(seed)
    torch.manual_seed(seed)
    experts = Networks(2 * HIDDEN, torch.default_generator) if case == "learned" else None
    router_class, config = parse_router({"name": setting.name, **setting.options(steps)})
    router = router_class(NUM_TASKS, NUM_EXPERTS, config)
    router.reset_parameters(0.02)
    parameters = [*router.parameters(), *(experts.parameters() if experts is not None else ())]
    optimizer = torch.optim.Adam(parameters, lr=rate) if parameters else None
    gate_MM = torch.eye(NUM_TASKS) * NUM_TASKS**0.5  # of unit root mean square, as after a norm
    info = TokenInfo(input_ids_T=torch.arange(NUM_TASKS))

    def predict(rows: Tensor | slice, weights_ME: Tensor) -> Tensor:
        return weights_ME @ (tasks.experts_ET[:, rows] if experts is None else experts(tasks.x_TD[rows]))

    used = 0.0
    for _ in range(steps):
        rows_T = torch.randint(NUM_TRAIN, (BATCH,))
        routing = router(gate_MM, info)
        weights_ME = weight_matrix(routing, NUM_TASKS)
        loss = (predict(rows_T, weights_ME) - tasks.targets_MT[:, rows_T]).square().mean() + own_losses(routing)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        finish_step(router, routing, NUM_TASKS, setting.bias_update_rate)
        used += evaluations(routing, NUM_TASKS) / steps
    router.eval()
    with torch.no_grad():
        weights_ME = weight_matrix(router(gate_MM, info), NUM_TASKS)
        test = slice(NUM_TRAIN, None)
        errors_MT = predict(test, weights_ME) - tasks.weights_ME @ tasks.experts_ET[:, test]
    found_ME, true_ME = weights_ME > SHARE * weights_ME.sum(1, keepdim=True).clamp_min(1e-9), tasks.weights_ME > 0
    if case == "learned":
        found_ME = found_ME[:, best_order(found_ME, true_ME)]
    return Outcome(
        loss=errors_MT.square().mean().item(),
        found=recovery(found_ME, true_ME),
        support=found_ME.float().sum(1).mean().item(),
        used=used,
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A router in one case; all rates and seeds."""

    key: str
    case: str
    steps: int
    seeds: tuple[int, ...]


def work(job: Job) -> Row:
    """The rate with the lowest loss on the tuning seed, then the seeds that are reported."""
    setting = next(setting for setting in MULTITASK if setting.key == job.key)
    best = min(RATES, key=lambda rate: train(setting, job.case, rate, TUNING_SEED, job.steps).loss)
    found = [train(setting, job.case, best, seed, job.steps) for seed in job.seeds]
    f1s, losses = [run.found.f1 for run in found], [run.loss for run in found]
    return {
        "part": "multitask",
        "case": job.case,
        "router": job.key,
        "lr": best,
        "f1": mean(f1s, 3),
        "f1_spread": spread(f1s, 3),
        "exact": mean([run.found.exact for run in found], 3),
        "loss": mean(losses),
        "loss_spread": spread(losses),
        "support": mean([run.support for run in found], 2),
        "used": mean([run.used for run in found], 2),
        "values": listed(f1s),
        "note": setting.note,
    }


def run(options: Options, keys: tuple[str, ...] | None) -> list[Row]:
    """One row per case and router; ``keys`` limits the routers."""

    def describe(row: Row) -> str:
        return f"multitask {row['case']} {row['router']}: F1 {row['f1']}, exact {row['exact']}, loss {row['loss']}"

    steps, seeds = (30, SEEDS[:2]) if options.quick else (STEPS, SEEDS)
    chosen = [setting for setting in MULTITASK if keys is None or setting.key in keys]
    jobs = [
        Job(key=setting.key, case=case, steps=steps, seeds=seeds)
        for case in CASES
        for setting in chosen
        if not setting.left_out
    ]
    rows = run_all(work, jobs, options, describe)
    return rows + [
        {"part": "multitask", "router": setting.key, "note": setting.left_out} for setting in chosen if setting.left_out
    ]


def gate(options: Options) -> list[Check]:
    """Supports are what they should be, and experts differ enough that a support is one and not another."""
    tasks = make_tasks(TUNING_SEED)
    sizes_M = (tasks.weights_ME > 0).sum(1)
    correlation_EE = torch.corrcoef(tasks.experts_ET) - torch.eye(NUM_EXPERTS)
    noise_MT = tasks.targets_MT - tasks.weights_ME @ tasks.experts_ET
    order_E = torch.randperm(NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    true_ME = tasks.weights_ME > 0
    shuffled_ME = true_ME[:, order_E]
    return [
        Check(name="multitask: experts per task", error=float((sizes_M - TOP_K).abs().max()), limit=0.0),
        Check(name="multitask: weights sum to 1", error=float((tasks.weights_ME.sum(1) - 1).abs().max()), limit=1e-6),
        Check(name="multitask: experts' largest correlation", error=float(correlation_EE.abs().max()), limit=0.8),
        Check(name="multitask: deviation of the noise", error=abs(noise_MT.std().item() / NOISE - 1), limit=0.05),
        Check(
            name="multitask: shuffled experts are matched",
            error=1 - recovery(shuffled_ME[:, best_order(shuffled_ME, true_ME)], true_ME).exact,
            limit=0.0,
        ),
    ]
