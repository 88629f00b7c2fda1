"""Part ``clusters``: the classification problem of "Towards Understanding the Mixture-of-Experts Layer" (Chen et al. 2022,
arXiv 2208.02813), with every router as the gate.

An example has four patches in random order: the feature of its cluster k with the sign of the label, the centre of its
cluster, the feature of another cluster with a random sign, and noise. With the cluster known, one direction tells the label.
Without it the two features cannot be told apart, and no network that adds up its patches is right on all examples, however
wide (`CEILING`). An expert is the paper's: a layer over single patches, cubic or linear, summed over patches; the gate reads
the sum of the patches.

Settings are those of the authors' released notebooks, their first one: 4 clusters, 8 experts of 8 + 8 neurons, D = 50, factors
U(0.5, 2), U(1, 2) and U(0.5, 3), noise of deviation 1, all times 10; full-batch steps of normalised gradient descent (1e-3 per
expert) from small weights, plain gradient descent for the router. Differences: 4,000 examples instead of 16,000; softmax
weights as in the paper, where the notebooks use raw scores; a plain cross-entropy; the gate's input scaled to about unit size.
The router's rate is the better of two on a seed that is not reported, for every router and kind of expert.

Why there is a ceiling: let f be what the network adds for a patch, and take two clusters with features v and w. Right labels
on all signs need f(v) + f(-w) > -f(c) > f(-v) + f(w) in the first and, with the parts exchanged, f(w) + f(-v) > -f(c') >
f(-w) + f(v) in the second. These contradict each other, so of eight equally likely cases one is wrong: at best 7 of 8 are
right where both features have factors of the same distribution (the paper's theorem). The noise's factor goes beyond the
label's in two of five examples, which a network might notice: 1 - 3/5 * 1/8 is what no single one exceeds here.

Legend: T examples, P patches, D size of a patch, C clusters, E experts, W neurons per class, H = 2W.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.routers.combine import apply_experts, evaluations, finish_step, own_losses, weight_matrix
from benchmarks.routers.protocol import SEEDS, TUNING_SEED, listed, mean, run_all, spread
from benchmarks.routers.settings import CLUSTERS, NUM_EXPERTS, GateSetting
from benchmarks.spec import Check, Options, Row
from moe.routers import parse_router
from moe.types import Routing, SoftRouting, TokenInfo

NUM_CLUSTERS, NUM_PATCHES, PATCH_DIM = 4, 4, 50
WIDTH = 8
SIGNAL, CENTER, FEATURE_NOISE = (0.5, 2.0), (1.0, 2.0), (0.5, 3.0)
SCALE = 10.0
CEILING = 1 - 3 / 5 / 8  # of the accuracy of one network for all clusters
STEPS, NUM_EXAMPLES = 500, 4000
EXPERT_RATE, SMALL = 1e-3, 1e-3
ROUTER_RATES: tuple[float, ...] = (0.1, 1.0)
SINGLE_RATES: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
CASES = {"cubic": 3, "linear": 1}
SINGLES = {"one expert": WIDTH, f"one expert, {NUM_EXPERTS} times wider": WIDTH * NUM_EXPERTS}


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Patches, labels 0 and 1, and the cluster that no model is told."""

    x_TPD: Tensor
    labels_T: Tensor
    clusters_T: Tensor
    features_CD: Tensor
    centers_CD: Tensor


def make_examples(seed: int, num_examples: int) -> Examples:
    """Training and test examples of one seed must come from one call: directions are drawn with them."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(bounds: tuple[float, float]) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(num_examples, 1, generator=generator)

    def signs() -> Tensor:
        return 2.0 * torch.randint(2, (num_examples, 1), generator=generator) - 1

    basis_DD = torch.linalg.qr(torch.randn(PATCH_DIM, PATCH_DIM, generator=generator)).Q
    features_CD, centers_CD = basis_DD.T[:NUM_CLUSTERS], basis_DD.T[NUM_CLUSTERS : 2 * NUM_CLUSTERS]
    clusters_T = torch.randint(NUM_CLUSTERS, (num_examples,), generator=generator)
    others_T = (clusters_T + torch.randint(1, NUM_CLUSTERS, (num_examples,), generator=generator)) % NUM_CLUSTERS
    y_T1 = signs()
    patches = [
        features_CD[clusters_T] * y_T1 * uniform(SIGNAL),
        centers_CD[clusters_T] * uniform(CENTER),
        features_CD[others_T] * signs() * uniform(FEATURE_NOISE),
        torch.randn(num_examples, PATCH_DIM, generator=generator) / math.sqrt(PATCH_DIM),
    ]
    order_TP = torch.rand(num_examples, NUM_PATCHES, generator=generator).argsort(1)
    x_TPD = torch.stack(patches, 1).gather(1, order_TP[..., None].expand(-1, -1, PATCH_DIM)) * SCALE
    return Examples(
        x_TPD=x_TPD,
        labels_T=(y_T1[:, 0] > 0).long(),
        clusters_T=clusters_T,
        features_CD=features_CD,
        centers_CD=centers_CD,
    )


def gate_input(x_TPD: Tensor) -> Tensor:
    """(T, D) sum of the patches, divided by its root mean square over the distribution."""
    power = sum((low**2 + low * high + high**2) / 3 for low, high in (SIGNAL, CENTER, FEATURE_NOISE)) + 1
    return x_TPD.sum(1) / (SCALE * math.sqrt(power / PATCH_DIM))


class PatchExperts(nn.Module):
    """E two-class experts of W neurons per class, which see one patch at a time."""

    def __init__(self, num_experts: int, width: int, power: int, scale: float) -> None:
        super().__init__()
        bound = scale / math.sqrt(PATCH_DIM)
        self.power = power
        self.weight_EHD = nn.Parameter(torch.empty(num_experts, 2 * width, PATCH_DIM).uniform_(-bound, bound))
        self.bias_EH = nn.Parameter(torch.empty(num_experts, 2 * width).uniform_(-bound, bound))

    def forward(self, expert: int, x_TX: Tensor) -> Tensor:
        """(T, P * D) -> (T, 2) class scores."""
        h_RH = x_TX.reshape(-1, PATCH_DIM) @ self.weight_EHD[expert].T + self.bias_EH[expert]
        h_RH = h_RH * h_RH * h_RH if self.power == 3 else h_RH
        return h_RH.view(-1, NUM_PATCHES, 2, h_RH.shape[1] // 2).sum((1, 3))

    @torch.no_grad()
    def normalized_step(self, rate: float) -> None:
        """Each expert moves by ``rate`` along its gradient, whatever the gradient's size; an idle one stays."""
        assert self.weight_EHD.grad is not None and self.bias_EH.grad is not None
        norm_E = self.weight_EHD.grad.flatten(1).norm(dim=1) + self.bias_EH.grad.norm(dim=1)
        step_E = torch.where(norm_E > 0, rate / norm_E.clamp_min(1e-30), 0)
        self.weight_EHD.sub_(step_E[:, None, None] * self.weight_EHD.grad)
        self.bias_EH.sub_(step_E[:, None] * self.bias_EH.grad)


def cluster_entropy(weights_TE: Tensor, clusters_T: Tensor) -> float:
    """H(cluster | expert) in nats, each token's weights scaled to sum 1: 0 where experts keep to a cluster, ln C at worst.

    Tokens without an expert count for nothing; ln C where there are no others.
    """
    weights_TE = weights_TE / weights_TE.sum(1, keepdim=True).clamp_min(1e-20)
    mass_CE = weights_TE.new_zeros(NUM_CLUSTERS, weights_TE.shape[1]).index_add(0, clusters_T, weights_TE)
    share_CE = mass_CE / mass_CE.sum(0).clamp_min(1e-20)
    entropy_E = -(share_CE * share_CE.clamp_min(1e-20).log()).sum(0)
    total = float(mass_CE.sum())
    return float((mass_CE.sum(0) * entropy_E).sum()) / total if total else math.log(NUM_CLUSTERS)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: test accuracy, cluster entropy of the test routing, expert evaluations per example in training."""

    accuracy: float
    entropy: float
    used: float


def train(setting: GateSetting, power: int, rate: float, seed: int, steps: int, num_examples: int) -> Outcome:
    """Experts by normalised gradient descent, the router by plain gradient descent of ``rate``."""
    data = make_examples(seed, 2 * num_examples)
    torch.manual_seed(seed)
    experts = PatchExperts(NUM_EXPERTS, WIDTH, power, SMALL)
    router_class, config = parse_router({"name": setting.name, **setting.options(steps)})
    router = router_class(PATCH_DIM, NUM_EXPERTS, config)
    router.reset_parameters(SMALL)
    x_TX, gate_TD, info = (
        data.x_TPD.flatten(1),
        gate_input(data.x_TPD),
        TokenInfo(input_ids_T=torch.arange(num_examples)),
    )

    def predict(rows: slice) -> tuple[Tensor, Routing | SoftRouting]:
        routing = router(gate_TD[rows], info)
        return apply_experts(x_TX[rows], routing, experts), routing

    old, new, used = slice(num_examples), slice(num_examples, None), 0.0
    for _ in range(steps):
        scores_T2, routing = predict(old)
        loss = F.cross_entropy(scores_T2, data.labels_T[old]) + own_losses(routing)
        experts.zero_grad()
        router.zero_grad()
        loss.backward()
        experts.normalized_step(EXPERT_RATE)
        with torch.no_grad():
            for parameter in router.parameters():
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad)
        finish_step(router, routing, num_examples, setting.bias_update_rate)
        used += evaluations(routing, num_examples) / steps
    router.eval()
    with torch.no_grad():
        scores_T2, routing = predict(new)
    return Outcome(
        accuracy=(scores_T2.argmax(1) == data.labels_T[new]).float().mean().item(),
        entropy=cluster_entropy(weight_matrix(routing, num_examples), data.clusters_T[new]),
        used=used,
    )


def train_single(width: int, power: int, rate: float, seed: int, steps: int, num_examples: int) -> Outcome:
    """One expert for all examples, by Adam from torch's default weights with weight decay, as in the notebooks."""
    data = make_examples(seed, 2 * num_examples)
    torch.manual_seed(seed)
    experts = PatchExperts(1, width, power, 1.0)
    optimizer = torch.optim.Adam(experts.parameters(), lr=rate, weight_decay=5e-4)
    x_TX, labels_T = data.x_TPD.flatten(1), data.labels_T
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(experts(0, x_TX[:num_examples]), labels_T[:num_examples]).backward()
        optimizer.step()
    with torch.no_grad():
        right_T = experts(0, x_TX[num_examples:]).argmax(1) == labels_T[num_examples:]
    return Outcome(accuracy=right_T.float().mean().item(), entropy=math.log(NUM_CLUSTERS), used=1.0)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A router, or one expert alone, with one kind of experts; all rates and seeds."""

    key: str
    case: str
    steps: int
    num_examples: int
    seeds: tuple[int, ...]


def work(job: Job) -> Row:
    """The rate with the best accuracy on the tuning seed, then the seeds that are reported."""
    power, sizes = CASES[job.case], (job.steps, job.num_examples)
    if job.key in SINGLES:
        note, rates = f"width {SINGLES[job.key]}, Adam", SINGLE_RATES

        def once(rate: float, seed: int) -> Outcome:
            return train_single(SINGLES[job.key], power, rate, seed, *sizes)
    else:
        setting = next(setting for setting in CLUSTERS if setting.key == job.key)
        note, rates = setting.note, ROUTER_RATES

        def once(rate: float, seed: int) -> Outcome:
            return train(setting, power, rate, seed, *sizes)

    best = max(rates, key=lambda rate: once(rate, TUNING_SEED).accuracy)
    found = [once(best, seed) for seed in job.seeds]
    accuracies, entropies = [run.accuracy for run in found], [run.entropy for run in found]
    return {
        "part": "clusters",
        "case": job.case,
        "router": job.key,
        "lr": best,
        "accuracy": mean(accuracies),
        "accuracy_spread": spread(accuracies),
        "cluster_entropy": mean(entropies, 3),
        "used": mean([run.used for run in found], 2),
        "values": listed(accuracies),
        "note": note,
    }


def jobs(options: Options, keys: tuple[str, ...] | None) -> list[Job]:
    steps, num_examples, seeds = (20, 200, SEEDS[:2]) if options.quick else (STEPS, NUM_EXAMPLES, SEEDS)
    names = [*SINGLES, *(setting.key for setting in CLUSTERS if not setting.left_out)]
    return [
        Job(key=key, case=case, steps=steps, num_examples=num_examples, seeds=seeds)
        for case in CASES
        for key in names
        if keys is None or key in keys or key in SINGLES
    ]


def run(options: Options, keys: tuple[str, ...] | None) -> list[Row]:
    """One row per kind of expert and router; ``keys`` limits the routers."""

    def describe(row: Row) -> str:
        return f"clusters {row['case']} {row['router']}: accuracy {row['accuracy']}, entropy {row['cluster_entropy']}"

    rows = run_all(work, jobs(options, keys), options, describe)
    out = [setting for setting in CLUSTERS if setting.left_out and (keys is None or setting.key in keys)]
    return rows + [{"part": "clusters", "router": setting.key, "note": setting.left_out} for setting in out]


def gate(options: Options) -> list[Check]:
    """The data is what the module says; each limit on a share is four standard errors."""
    num_examples = 20_000
    data = make_examples(TUNING_SEED, num_examples)
    directions_XD = torch.cat([data.features_CD, data.centers_CD])
    gram_XX = directions_XD @ directions_XD.T
    y_T = 2.0 * data.labels_T - 1
    scores_TC = data.x_TPD.sum(1) @ data.features_CD.T
    known_T = scores_TC.gather(1, data.clusters_T[:, None])[:, 0] * y_T > 0
    blind_T = scores_TC.sum(1) * y_T > 0
    centers_T = (data.x_TPD.sum(1) @ data.centers_CD.T).argmax(1) == data.clusters_T
    size = gate_input(data.x_TPD).square().mean().sqrt().item()
    error = 4 * 0.5 / math.sqrt(num_examples)
    return [
        Check(
            name="clusters: directions are orthonormal", error=float((gram_XX - torch.eye(8)).abs().max()), limit=1e-5
        ),
        Check(name="clusters: labels are balanced", error=abs(y_T.mean().item()) / 2, limit=error),
        Check(name="clusters: the feature of the own cluster tells the label", error=1 - mean_of(known_T), limit=0.005),
        Check(name="clusters: the sum of all features does in 65 %", error=abs(mean_of(blind_T) - 0.65), limit=error),
        Check(name="clusters: the centre tells the cluster", error=1 - mean_of(centers_T), limit=0.005),
        Check(name="clusters: the gate's input has unit size", error=abs(size - 1), limit=0.02),
    ]


def mean_of(hits_T: Tensor) -> float:
    return hits_T.float().mean().item()
