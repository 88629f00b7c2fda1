"""MixER's gate (Nzoyem et al. 2025, arXiv 2502.05335): top-1 by a linear map that k-means and least squares find.

    g = W^T [x; 1],  expert = argmax g,  weight 1

The output is not multiplied by g and no gradient reaches W. Every ``update_every`` optimizer steps, recent router inputs are
clustered into E clusters by k-means (assignment by mean absolute distance, centroids are means), and W is the least-squares map
from inputs to the one-hot experts of their clusters. An update that does not converge, or leaves a cluster empty, is skipped.

The paper clusters one context vector per environment and knows the loss of every expert on every environment: clusters then go
to the experts that do best on them. `KMeansRouter.update` does this for users who have such losses. Inside a language model a
token has seen one expert only, so there cluster e belongs to expert e, and warm-started centroids keep it so.

Where this differs from the authors' released code: least squares adds a ridge equal to the expected effect of their input noise
of deviation 1e-4 and draws none; converging in the last allowed iteration counts as converged; centroids that have not
converged are kept for the next update (an empty cluster starts afresh in both); the first centroids are means of a random
partition of the inputs around their mean, instead of U(-1e-3, 1e-3), which suits contexts that start at zero; and tokens have a
tolerance of their own.

Legend: T tokens, D model, I = D + 1 (x with a one appended), E experts, C clusters, S samples, R samples of one step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.routers.assemble import routing_of_choices
from moe.routers.base import RouterConfig, StepLoad
from moe.routers.schedule import ScheduledRouter
from moe.types import NO_INFO, Routing, TokenInfo

MAX_ITERATIONS, TOLERANCE = 20, 1e-4  # of k-means, in the paper's code
NOISE_STD = 1e-4  # of the inputs in least squares

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class KMeansConfig(RouterConfig):
    """Options of `KMeansRouter`.

    Attributes:
        update_every: optimizer steps between updates of the gate.
        num_samples: S, tokens that each rank remembers of the last steps. Over all ranks it should be well above D, or the
            least squares fit the samples and nothing else.
        tolerance: k-means on tokens has converged when no centroid moves by more than this share of the samples' mean absolute
            distance from their mean. (The paper's 1e-4, absolute, is for a handful of contexts;
            thousands of tokens do not get there within the allowed iterations.)
    """

    update_every: int = 100
    num_samples: int = 4096
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if self.update_every < 1:
            raise ValueError(f"router.update_every={self.update_every} must be at least 1")
        if self.num_samples < 1:
            raise ValueError(f"router.num_samples={self.num_samples} must be at least 1")
        if self.tolerance < 0:
            raise ValueError(f"router.tolerance={self.tolerance} must not be negative")


class KMeansRouter(ScheduledRouter):
    """Top-1 by clusters of the router's inputs.

    In training, each forward pass notes some of its tokens: R rows in a place that depends on the optimizer step alone. A
    checkpointed forward that runs again writes the same rows again, and micro-batches of one step overwrite each other.
    The samples are not saved: after a resume, the next update sees the steps since then.

    Attributes:
        gate_EI: (E, D + 1) fp32 buffer, W transposed.
        centroids_ED: (E, D) fp32 buffer; all zero before the first update and after an empty cluster.
    """

    Config = KMeansConfig
    config: KMeansConfig
    fp32_buffers = ("gate_EI", "centroids_ED")
    takes_balance_loss = False

    def __init__(self, dim: int, num_experts: int, config: KMeansConfig) -> None:
        super().__init__(dim, num_experts, config)
        if config.num_samples < num_experts:
            raise ValueError(
                f"router.num_samples={config.num_samples} is below num_experts={num_experts}, so a cluster would always be "
                "empty; raise it"
            )
        self.register_buffer("gate_EI", torch.empty(num_experts, dim + 1, dtype=torch.float32))
        self.register_buffer("centroids_ED", torch.empty(num_experts, dim, dtype=torch.float32))
        self._num_slots = min(config.update_every, config.num_samples)
        self._samples_SD: Tensor | None = None
        self._filled_S: Tensor | None = None
        self.reset_parameters(0.02)

    def reset_parameters(self, std: float) -> None:
        """Uniform gate within 1/sqrt(D), as in the released code; no centroids, no samples, step 0."""
        super().reset_parameters(std)
        bound = self.dim**-0.5
        nn.init.uniform_(self.get_buffer("gate_EI"), -bound, bound)
        nn.init.zeros_(self.get_buffer("centroids_ED"))
        self._samples_SD = self._filled_S = None

    @property
    def mean_experts_per_token(self) -> float:
        """One."""
        return 1

    def forward(self, x_TD: Tensor, info: TokenInfo = NO_INFO) -> Routing:
        """Route every token to one expert with weight 1; logits and probabilities are for metrics, without gradient."""
        with torch.no_grad(), torch.autocast(x_TD.device.type, enabled=False):
            if self.training:
                self._remember(x_TD, info.keep_T)
            gate_EI = self.get_buffer("gate_EI")
            logits_TE = F.linear(x_TD.float(), gate_EI[:, :-1], gate_EI[:, -1])
            expert_T1 = logits_TE.argmax(-1, keepdim=True)
        return routing_of_choices(
            expert_T1,
            torch.ones_like(expert_T1, dtype=torch.float32),
            self.num_experts,
            logits_TE=logits_TE,
            probs_TE=logits_TE.softmax(-1),
        )

    def _remember(self, x_TD: Tensor, keep_T: Tensor | None) -> None:
        """Overwrite the rows of this step with tokens at equal distances, padding left out."""
        num_tokens, num_rows = x_TD.shape[0], self.config.num_samples // self._num_slots
        if num_tokens == 0:
            return
        samples_SD, filled_S = self._samples_SD, self._filled_S
        if samples_SD is None or filled_S is None or samples_SD.device != x_TD.device:
            samples_SD = torch.zeros(self._num_slots * num_rows, self.dim, device=x_TD.device)
            filled_S = torch.zeros(self._num_slots * num_rows, device=x_TD.device)
            self._samples_SD, self._filled_S = samples_SD, filled_S
        row_R = torch.arange(num_rows, device=x_TD.device)
        if keep_T is None:
            kept_first_T, num_kept = torch.arange(num_tokens, device=x_TD.device), row_R.new_tensor(num_tokens)
        else:
            kept_first_T, num_kept = (~keep_T).to(torch.int8).argsort(stable=True), keep_T.sum()
        place_R = (row_R * (num_kept / num_rows).clamp_min(1)).long()
        slot_R = (self.get_buffer("steps") % self._num_slots) * num_rows + row_R
        samples_SD[slot_R] = x_TD[kept_first_T[place_R.clamp_max(num_tokens - 1)]].float()
        filled_S[slot_R] = (place_R < num_kept).float()

    def after_step(self, load: StepLoad) -> None:
        """Update the gate every ``update_every`` steps; collective then, with the same result on all ranks."""
        super().after_step(load)
        if int(self.get_buffer("steps")) % self.config.update_every:
            return
        samples_SD, filled_S = self._samples_SD, self._filled_S
        if samples_SD is None or filled_S is None:  # this rank had no tokens, but others wait for its sums
            centroids_ED = self.get_buffer("centroids_ED")
            samples_SD, filled_S = torch.zeros_like(centroids_ED), torch.zeros_like(centroids_ED[:, 0])
        spread = _mean_deviation(samples_SD, filled_S, load.reduce)
        clusters = self._cluster(samples_SD, filled_S, self.config.tolerance * spread, load.reduce)
        if clusters is not None:
            self._fit(samples_SD, clusters.cluster_S, filled_S, load.reduce)

    @torch.no_grad()
    def update(self, contexts_SD: Tensor, losses_SE: Tensor) -> bool:
        """Update the gate from contexts and the loss of every expert on each of them, as in the paper.

        Args:
            contexts_SD: (S, D), all of them on every rank.
            losses_SE: (S, E).

        Returns:
            Whether the gate changed: False when k-means did not converge or left a cluster empty.
        """
        if losses_SE.shape != (contexts_SD.shape[0], self.num_experts):
            raise ValueError(
                f"losses_SE has shape {tuple(losses_SE.shape)}; give one loss per context and expert, "
                f"({contexts_SD.shape[0]}, {self.num_experts})"
            )
        weights_S = torch.ones_like(contexts_SD[:, 0], dtype=torch.float32)
        clusters = self._cluster(contexts_SD.float(), weights_S, TOLERANCE, _alone)
        if clusters is None:
            return False
        medians = [losses_SE[clusters.cluster_S == cluster].median(0).values for cluster in range(self.num_experts)]
        expert_C = match_experts(torch.stack(medians))
        return self._fit(contexts_SD.float(), expert_C[clusters.cluster_S], weights_S, _alone)

    def _cluster(self, samples_SD: Tensor, weights_S: Tensor, tolerance: float, reduce: Reduce) -> "Clusters | None":
        """Clusters to fit the gate to, or ``None``; what the next update starts from is noted either way."""
        centroids_ED = self.get_buffer("centroids_ED")
        start_ED = centroids_ED
        if not bool(centroids_ED.any()):
            start_ED = first_centroids(samples_SD, weights_S, self.num_experts, int(self.get_buffer("steps")), reduce)
        found = kmeans_l1(samples_SD, start_ED, weights_S, tolerance, reduce=reduce)
        if found.has_empty or not bool(found.centroids_CD.isfinite().all()):
            centroids_ED.zero_()
            return None
        centroids_ED.copy_(found.centroids_CD)
        return found if found.converged else None

    def _fit(self, x_SD: Tensor, expert_S: Tensor, weights_S: Tensor, reduce: Reduce) -> bool:
        gate_EI = fit_gate(x_SD, expert_S, self.num_experts, weights_S, reduce)
        if not bool(gate_EI.isfinite().all()):
            return False
        self.get_buffer("gate_EI").copy_(gate_EI)
        return True


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """What `kmeans_l1` found.

    Attributes:
        centroids_CD: (C, D) fp32.
        cluster_S: (S,) int64, the cluster of each sample.
        converged: whether the centroids stopped moving within the allowed iterations.
        has_empty: whether a cluster had no sample in some iteration, which ends the search.
    """

    centroids_CD: Tensor
    cluster_S: Tensor
    converged: bool
    has_empty: bool


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _cluster_means(x_SD: Tensor, cluster_S: Tensor, weights_S: Tensor, num_clusters: int, reduce: Reduce) -> Tensor:
    """(C, D + 1) fp64: mean of the samples of each cluster over all ranks, and how many there are; NaN where none."""
    member_SC = F.one_hot(cluster_S, num_clusters).double() * weights_S.double()[:, None]
    x_SI = F.pad(x_SD.double(), (0, 1), value=1.0)
    sums_CI = reduce(member_SC.T @ x_SI)
    return torch.cat([sums_CI[:, :-1] / sums_CI[:, -1:], sums_CI[:, -1:]], dim=1)


def _mean_deviation(x_SD: Tensor, weights_S: Tensor, reduce: Reduce) -> float:
    """Mean absolute deviation of all coordinates of all samples from their means over all ranks."""
    mean_I = _cluster_means(x_SD, torch.zeros_like(weights_S, dtype=torch.int64), weights_S, 1, reduce)[0]
    deviation_S = (x_SD - mean_I[:-1]).abs().mean(-1) * weights_S
    return float(reduce(deviation_S.sum()) / mean_I[-1])


def first_centroids(x_SD: Tensor, weights_S: Tensor, num_clusters: int, seed: int, reduce: Reduce = _alone) -> Tensor:
    """(C, D) fp32 means of a random partition: each sample goes to the random direction it lies furthest along.

    Directions start at the mean of all samples and are the same on all ranks.
    """
    everything_S = torch.zeros_like(weights_S, dtype=torch.int64)
    mean_D = _cluster_means(x_SD, everything_S, weights_S, 1, reduce)[0, :-1].float()
    generator = torch.Generator().manual_seed(seed)
    direction_CD = torch.randn(num_clusters, x_SD.shape[1], generator=generator).to(x_SD.device)
    cluster_S = ((x_SD - mean_D) @ direction_CD.T).argmax(-1)
    means_CI = _cluster_means(x_SD, cluster_S, weights_S, num_clusters, reduce)
    return torch.where(means_CI[:, -1:] > 0, means_CI[:, :-1].float(), mean_D)


def kmeans_l1(
    x_SD: Tensor,
    centroids_CD: Tensor,
    weights_S: Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    reduce: Reduce = _alone,
) -> Clusters:
    """Lloyd's iterations: each sample to the centroid of least mean absolute distance, each centroid to its samples' mean.

    Args:
        x_SD: (S, D) fp32 samples of this rank.
        centroids_CD: (C, D) to start from, the same on all ranks.
        weights_S: (S,) weight of each sample in the means; 0 leaves it out. All 1 by default.
        tolerance: converged when no centroid moves by a larger mean absolute distance.
        max_iterations: at least 1.
        reduce: sums a tensor over ranks.
    """
    weights_S = torch.ones_like(x_SD[:, 0]) if weights_S is None else weights_S
    converged = has_empty = False
    for _ in range(max_iterations):
        cluster_S = torch.cdist(x_SD, centroids_CD.to(x_SD.dtype), p=1).argmin(-1)
        means_CI = _cluster_means(x_SD, cluster_S, weights_S, len(centroids_CD), reduce)
        has_empty = bool((means_CI[:, -1] == 0).any())
        if has_empty:
            break
        before_CD, centroids_CD = centroids_CD, means_CI[:, :-1].float()
        converged = bool((centroids_CD - before_CD).abs().mean(-1).max() <= tolerance)
        if converged:
            break
    return Clusters(centroids_CD=centroids_CD, cluster_S=cluster_S, converged=converged, has_empty=has_empty)


def fit_gate(
    x_SD: Tensor, expert_S: Tensor, num_experts: int, weights_S: Tensor | None = None, reduce: Reduce = _alone
) -> Tensor:
    """(E, D + 1) fp32 least-squares map from [x; 1] to the one-hot expert, by the normal equations in fp64.

    Args:
        x_SD: (S, D) samples of this rank.
        expert_S: (S,) int64, the expert of each.
        num_experts: E.
        weights_S: (S,) weights; all 1 by default.
        reduce: sums a tensor over ranks.

    Returns:
        Not finite where the equations are singular to working precision.
    """
    dim = x_SD.shape[1]
    x_SI = F.pad(x_SD.double(), (0, 1), value=1.0)
    target_SE = F.one_hot(expert_S, num_experts).double()
    weighted_IS = x_SI.T if weights_S is None else x_SI.T * weights_S.double()
    sums = reduce(weighted_IS @ torch.cat([x_SI, target_SE], dim=1))
    gram_II, moment_IE = sums[:, : dim + 1].clone(), sums[:, dim + 1 :]
    # The expectation of X^T X when every input has noise; it also makes the system regular.
    gram_II.diagonal()[:dim] += gram_II[-1, -1] * NOISE_STD**2
    solution_IE, info = torch.linalg.solve_ex(gram_II, moment_IE)
    return torch.where(info == 0, solution_IE, torch.nan).T.float()


def match_experts(losses_CE: Tensor) -> Tensor:
    """(C,) int64, a different expert for each cluster: in order, the one of least loss that is not taken yet.

    Args:
        losses_CE: (C, E) loss of each expert on each cluster (the paper's is the median over the cluster), C <= E.
    """
    expert_C: list[int] = []
    for losses_E in losses_CE:
        expert_C.append(next(expert for expert in losses_E.argsort(stable=True).tolist() if expert not in expert_C))
    return torch.tensor(expert_C, device=losses_CE.device)
