"""Part ``tabular``: MLP, softmax MoE and GG MoE on four real data sets that scikit-learn ships, so nothing is downloaded.

Four models: an MLP of width 128, the two mixtures of the same total width (see `gg_moe`), and an MLP that is as small as
they are. Ten seeds; a seed fixes the split (60% training, 20% validation, 20% test, classes in proportion), the initial weights and
the order of the rows, and all models see the same ten splits. Features (and the target of a regression) are scaled by the mean and
deviation of the training part. AdamW with weight decay 1e-4; each model and seed takes the learning rate of the grid and the
epoch with the best loss on its validation part; the test part is looked at once.

Scores are accuracy, and for ``diabetes``, a regression, R^2. A difference between two models is that of their pairs of equal
split, since splits differ by more than models do.

Legend: T rows, D features, O outputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.routers.gg_moe import NUM_EXPERTS, TableMoE, make_mlp, matching_width, num_parameters
from benchmarks.routers.protocol import listed, mean, run_all, spread
from benchmarks.spec import Check, Options, Row

DATASETS = ("breast_cancer", "wine", "digits", "diabetes")
MLP, SMALL, SOFTMAX, GUMBEL = "MLP", "small MLP", "softmax MoE", "GG MoE"
MODELS = (MLP, SMALL, SOFTMAX, GUMBEL)
WIDTH = 128
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = tuple(range(10))
MAX_EPOCHS, PATIENCE, BATCH, DECAY = 200, 20, 64, 1e-4


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one part of a split; targets are classes (int64) or scaled numbers (T, 1)."""

    x_TD: Tensor
    y: Tensor


@dataclass(frozen=True, kw_only=True)
class Table:
    """One split of a data set. ``num_outputs`` is 1 for a regression."""

    train: Part
    valid: Part
    test: Part
    num_outputs: int

    @property
    def is_regression(self) -> bool:
        return self.num_outputs == 1


def load_table(name: str, seed: int) -> Table:
    """Scaled and split; ``seed`` decides the split alone."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    classes = None if name == "diabetes" else y
    fitted, test = train_test_split(range(len(x)), test_size=0.2, random_state=seed, stratify=classes)
    within = None if classes is None else classes[fitted]
    train, valid = train_test_split(fitted, test_size=0.25, random_state=seed, stratify=within)
    x_TD = torch.as_tensor(x, dtype=torch.float32)
    target = torch.as_tensor(y, dtype=torch.float32 if classes is None else torch.int64)
    deviation_D = x_TD[train].std(0)
    x_TD = (x_TD - x_TD[train].mean(0)) / torch.where(deviation_D > 0, deviation_D, 1)
    if classes is None:
        target = ((target - target[train].mean()) / target[train].std())[:, None]
    parts = [Part(x_TD=x_TD[rows], y=target[rows]) for rows in (train, valid, test)]
    outputs = 1 if classes is None else int(target.max()) + 1
    return Table(train=parts[0], valid=parts[1], test=parts[2], num_outputs=outputs)


def make_model(name: str, dim: int, num_outputs: int) -> nn.Module:
    """One of `MODELS`, from the global generator."""
    if name == MLP:
        return make_mlp(dim, num_outputs, WIDTH)
    if name == SMALL:
        with torch.random.fork_rng():
            target = num_parameters(TableMoE(dim, num_outputs, WIDTH, sampled=True))
            width = matching_width(dim, num_outputs, target)
        return make_mlp(dim, num_outputs, width)
    return TableMoE(dim, num_outputs, WIDTH, sampled=name == GUMBEL)


def loss_of(model: nn.Module, part: Part) -> Tensor:
    """Cross-entropy, or mean squared error of the scaled target."""
    output = model(part.x_TD)
    return F.cross_entropy(output, part.y) if part.y.dim() == 1 else F.mse_loss(output, part.y)


@torch.no_grad()
def score_of(model: nn.Module, part: Part) -> float:
    """Accuracy or R^2."""
    output = model.eval()(part.x_TD)
    if part.y.dim() == 1:
        return (output.argmax(1) == part.y).float().mean().item()
    return 1 - ((output - part.y).square().sum() / (part.y - part.y.mean()).square().sum()).item()


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Best validation loss of a run and the test score at that epoch."""

    valid_loss: float
    test_score: float


def fit(model_name: str, table: Table, rate: float, seed: int, max_epochs: int) -> Fit:
    """Train until the validation loss has not improved for ``PATIENCE`` epochs."""
    torch.manual_seed(seed)
    model = make_model(model_name, table.train.x_TD.shape[1], table.num_outputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY)
    num_rows = len(table.train.x_TD)
    best, best_state, since = math.inf, model.state_dict(), 0
    for _ in range(max_epochs):
        model.train()
        for rows in torch.randperm(num_rows).split(BATCH):
            optimizer.zero_grad()
            loss_of(model, Part(x_TD=table.train.x_TD[rows], y=table.train.y[rows])).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            valid_loss = loss_of(model, table.valid).item()
        since += 1
        if valid_loss < best:
            best, since = valid_loss, 0
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        if since == PATIENCE:
            break
    model.load_state_dict(best_state)
    return Fit(valid_loss=best, test_score=score_of(model, table.test))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model on a data set; all rates and seeds."""

    dataset: str
    model: str
    seeds: tuple[int, ...]
    max_epochs: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Test scores of a model, one per seed."""

    job: Job
    values: list[float]


def work(job: Job) -> Scores:
    """For every seed, the rate with the best validation loss."""
    values = []
    for seed in job.seeds:
        table = load_table(job.dataset, seed)
        fits = [fit(job.model, table, rate, seed, job.max_epochs) for rate in RATES]
        values.append(min(fits, key=lambda found: found.valid_loss).test_score)
    return Scores(job=job, values=values)


def run(options: Options, keys: tuple[str, ...] | None) -> list[Row]:
    """One row per data set and model; there are no routers to limit but the gates of the two mixtures."""
    seeds, max_epochs = (SEEDS[:2], 2) if options.quick else (SEEDS, MAX_EPOCHS)
    jobs = [
        Job(dataset=dataset, model=model, seeds=seeds, max_epochs=max_epochs)
        for dataset in (DATASETS[1:2] if options.quick else DATASETS)
        for model in MODELS
    ]

    def describe(scores: Scores) -> str:
        return f"tabular {scores.job.dataset} {scores.job.model}: {mean(scores.values)}"

    found = run_all(work, jobs, options, describe)
    baselines = {scores.job.dataset: scores.values for scores in found if scores.job.model == MLP}
    return [_row(scores, baselines[scores.job.dataset]) for scores in found]


def _row(scores: Scores, baseline: list[float]) -> Row:
    table = load_table(scores.job.dataset, 0)
    gains = [value - base for value, base in zip(scores.values, baseline, strict=True)]
    is_baseline = scores.job.model == MLP
    return {
        "part": "tabular",
        "case": scores.job.dataset,
        "model": scores.job.model,
        "total_params": num_parameters(make_model(scores.job.model, table.train.x_TD.shape[1], table.num_outputs)),
        "metric": "R2" if table.is_regression else "accuracy",
        "score": mean(scores.values),
        "score_spread": spread(scores.values),
        "gain": None if is_baseline else mean(gains),
        "gain_spread": None if is_baseline else spread(gains),
        "values": listed(scores.values),
    }


def gate(options: Options) -> list[Check]:
    """Splits do not overlap and are scaled; parameter counts are what the models' definitions say."""
    checks = []
    for name in DATASETS:
        table = load_table(name, 0)
        dim, outputs = table.train.x_TD.shape[1], table.num_outputs
        counts = {model: num_parameters(make_model(model, dim, outputs)) for model in MODELS}
        hidden = WIDTH // NUM_EXPERTS
        expected = NUM_EXPERTS * (dim * hidden + hidden**2 + hidden * outputs + dim + 1)
        smaller = (counts[SMALL] - counts[GUMBEL]) / counts[GUMBEL]
        used = table.train.x_TD.std(0) > 0
        checks += [
            Check(name=f"tabular {name}: parameters of both mixtures", error=abs(counts[GUMBEL] - expected), limit=0.0),
            Check(name=f"tabular {name}: mixtures are equal", error=abs(counts[SOFTMAX] - counts[GUMBEL]), limit=0.0),
            Check(name=f"tabular {name}: the small MLP's parameters", error=abs(smaller), limit=0.05),
            Check(
                name=f"tabular {name}: training features have deviation 1",
                error=float((table.train.x_TD.std(0)[used] - 1).abs().max()),
                limit=1e-4,
            ),
        ]
    return checks
