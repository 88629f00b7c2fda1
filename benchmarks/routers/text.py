"""Part ``text``: a small causal language model on the text of Python's standard library, with every router.

Two layers, D = 64, a vocabulary of 1,024 learned on the training text, windows of 128 tokens, 16 per step: the same tokens in
the same order for every router. AdamW and the schedule of the project's recipes (`moe.train.optim`). One learning rate for
all: of 2e-3, 4e-3 and 8e-3, the dense model and top-k alike do best with 4e-3 on a seed that is not reported. `settings.TEXT`
has the options; active parameters are those of the dense model plus the router's own wherever ``ffn_flops`` is 1.

Training runs in parallel processes of one thread. Speed is measured afterwards and apart from them: a training step of every
model as it was trained on the first seed, in turns, with all threads.

Columns: ``loss`` is the held-out cross-entropy; ``max_violation`` and ``entropy`` are means over the layers and the last 50 steps
of training; ``used`` is the expert evaluations per token over the whole of training, ``ffn_flops`` what the configuration says
of them relative to the dense FFN.

Legend: B sequences, L window, T tokens, V vocabulary, F width of an expert.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.record import ROOT
from benchmarks.routers.protocol import SEEDS, TUNING_SEED, listed, mean, run_all, spread
from benchmarks.routers.settings import TEXT, TEXT_BATCH, TOP_K, TextSetting
from benchmarks.spec import Check, Options, Row
from benchmarks.timing import in_turns
from moe.layer import finish_step, moe_layers
from moe.models import MoEConfig, MoEForCausalLM
from moe.observe import LayerStats
from moe.routers.losses import max_violation
from moe.train.config import OptimConfig
from moe.train.data import Batch, BatchLoader, DataBundle, DataConfig, TokenizerConfig, build_data, eval_batches
from moe.train.model import parameter_counts
from moe.train.optim import learning_rate, param_groups

DENSE = "dense"
RATE, STEPS, EVAL_WINDOWS = 4e-3, 350, 256
LAST = 50  # steps over which the routing's statistics are taken


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model and its windows."""

    dim: int = 64
    expert: int = 128
    heads: int = 4
    vocab: int = 1024
    length: int = 128


FULL, QUICK = Size(), Size(dim=16, expert=8, heads=2, vocab=300, length=16)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. ``folder`` receives the trained weights; ``None`` keeps none."""

    key: str
    seed: int
    steps: int
    size: Size
    data: DataConfig
    rate: float = RATE
    eval_windows: int = EVAL_WINDOWS
    folder: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run found; ``None`` where a model or router has no such thing."""

    job: Job
    loss: float
    max_violation: float | None
    entropy: float | None
    used: float | None


def find(key: str) -> TextSetting:
    return next(setting for setting in TEXT if setting.key == key)


def make_model(key: str, steps: int, size: Size) -> nn.Module:
    """The dense model or one with a router, from the global generator."""
    text_config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.dim,
        intermediate_size=TOP_K * size.expert,
        num_hidden_layers=2,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    if key == DENSE:
        return AutoModelForCausalLM.from_config(text_config)
    setting = find(key)
    spec: dict[str, Any] = {
        "num_experts": setting.num_experts,
        "expert_hidden": setting.width * size.expert,
        "router": {"name": setting.name, **setting.options(steps)},
        "balance": setting.balance,
    }
    return MoEForCausalLM(MoEConfig(text_config=text_config, moe=spec))


def step_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch; labels are shifted already."""
    return model(input_ids=batch.input_ids_BL, shift_labels=batch.labels_BL, labels=batch.labels_BL).loss


class Trainer:
    """Model, optimizer and schedule of one run."""

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        self.model, self.steps, self.step = model.train(), steps, 0
        self.config = OptimConfig(lr=rate, warmup_steps=min(20, steps))
        named = dict(model.named_parameters())
        groups = [
            {**group, "params": [named[name] for name in group["params"]]} for group in param_groups(model, self.config)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=self.config.betas, eps=self.config.eps)
        self.layers = list(moe_layers(model).values())

    def train_on(self, batch: Batch) -> list[LayerStats]:
        """One optimizer step; the statistics of the MoE layers."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, min(self.step, self.steps - 1), self.steps)
        self.optimizer.zero_grad()
        step_loss(self.model, batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.step += 1
        return finish_step(self.layers)


@torch.no_grad()
def held_out_loss(model: nn.Module, bundle: DataBundle, max_windows: int) -> float:
    """Mean over whole batches of the training's size, since some routers compare the sequences of a batch."""
    model.eval()
    assert bundle.evaluation is not None
    max_windows = min(max_windows, bundle.evaluation.samples_per_epoch // TEXT_BATCH * TEXT_BATCH)
    losses = [
        step_loss(model, batch).item() for batch in eval_batches(bundle.evaluation, TEXT_BATCH, 0, 1, max_windows)
    ]
    return statistics.mean(losses)


def train(job: Job) -> Trained:
    """One run from its seed."""
    bundle = build_data(job.data)
    loader = BatchLoader(bundle.train, TEXT_BATCH, 0, 1)
    torch.manual_seed(job.seed)
    trainer = Trainer(make_model(job.key, job.steps, job.size), job.rate, job.steps)
    violations, entropies, assigned, tokens = [], [], 0.0, 0.0
    for step in range(job.steps):
        for stats in trainer.train_on(loader.next_step()[0]):
            assert stats.counts_E is not None
            assigned, tokens = assigned + stats.sums["assigned"].item(), tokens + stats.sums["tokens"].item()
            if step >= job.steps - LAST:
                violations.append(max_violation(stats.counts_E).item())
                if "entropy" in stats.sums:
                    entropies.append(stats.sums["entropy"].item())
    loss = held_out_loss(trainer.model, bundle, job.eval_windows)
    if job.folder is not None:
        torch.save(trainer.model.state_dict(), weights_of(job))
    return Trained(
        job=job,
        loss=loss,
        max_violation=mean(violations, 2) if violations else None,
        entropy=mean(entropies, 3) if entropies else None,
        used=round(assigned / tokens, 2) if tokens else None,
    )


def weights_of(job: Job) -> Path:
    assert job.folder is not None
    return Path(job.folder) / f"{job.key.replace(' ', '-')}.pt"


def speeds(jobs: list[Job], bundle: DataBundle, options: Options) -> dict[str, Row]:
    """Tokens per second of a training step of each trained model, measured in turns."""
    batch = BatchLoader(bundle.train, TEXT_BATCH, 0, 1).next_step()[0]
    trainers = {}
    for job in jobs:
        model = make_model(job.key, job.steps, job.size)
        model.load_state_dict(torch.load(weights_of(job), weights_only=True))
        trainers[job.key] = Trainer(model, job.rate, job.steps)
        trainers[job.key].step = job.steps
    functions = {key: (lambda trainer=trainer: trainer.train_on(batch)) for key, trainer in trainers.items()}
    times = in_turns(functions, options.repeats, options.wait_s, options.report)
    return {
        key: {
            "tokens_per_s": round(batch.input_ids_BL.numel() / timing.quantile_ms(0.5) * 1e3),
            "step_ms": timing.quantile_ms(0.5),
            "waiting": timing.waiting,
        }
        for key, timing in times.items()
    }


def ffn_flops(setting: TextSetting, steps: int, size: Size) -> float:
    """Expert FLOPs per token relative to the dense FFN, from the configuration."""
    model = make_model(setting.key, steps, size)
    evaluations = next(iter(moe_layers(model).values())).router.mean_experts_per_token
    return evaluations * setting.width / TOP_K


def _row(key: str, runs: list[Trained], speed: Row) -> Row:
    losses = [run.loss for run in runs]
    job = runs[0].job
    counts = parameter_counts(make_model(key, job.steps, job.size))

    def average(name: str, digits: int) -> float | None:
        values = [getattr(run, name) for run in runs if getattr(run, name) is not None]
        return mean(values, digits) if values else None

    row: Row = {
        "part": "text",
        "router": key,
        "lr": job.rate,
        "loss": mean(losses),
        "loss_spread": spread(losses),
        "max_violation": average("max_violation", 2),
        "entropy": average("entropy", 2),
        "used": average("used", 2),
        "total_params": counts["total_params"],
        "active_params": counts["active_params"],
        "values": listed(losses),
        **speed,
    }
    if key != DENSE:
        setting = find(key)
        flops = round(ffn_flops(setting, job.steps, job.size), 2)
        experts = f"{setting.num_experts} x {setting.width * job.size.expert}"
        row |= {"experts": experts, "ffn_flops": flops, "note": setting.note}
    else:
        row |= {"experts": f"1 x {TOP_K * job.size.expert}", "ffn_flops": 1.0}
    return row


def quick_data(folder: Path) -> DataConfig:
    """A small corpus of this project's own documents, cached in ``folder``."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    (folder / "text.txt").write_text(text)
    return DataConfig(
        source=str(folder / "text.txt"),
        seq_len=QUICK.length,
        eval_fraction=0.2,
        cache_dir=str(folder),
        tokenizer=TokenizerConfig(vocab_size=QUICK.vocab),
    )


def full_data() -> DataConfig:
    return DataConfig(source="stdlib", seq_len=FULL.length, tokenizer=TokenizerConfig(vocab_size=FULL.vocab))


def run(options: Options, keys: tuple[str, ...] | None) -> list[Row]:
    """One row per router and one for the dense model; ``keys`` limits the routers."""
    chosen = [DENSE, *(setting.key for setting in TEXT if keys is None or setting.key in keys)]
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {"steps": STEPS, "size": FULL}
        data = full_data()
        if options.quick:
            common, data = {"steps": 3, "size": QUICK, "eval_windows": TEXT_BATCH}, quick_data(Path(folder))
        bundle = build_data(data)  # the first to do so fills the cache
        jobs = [
            Job(key=key, seed=seed, data=data, folder=folder if seed == SEEDS[0] else None, **common)
            for seed in (SEEDS[:2] if options.quick else SEEDS)
            for key in chosen
        ]

        def describe(trained: Trained) -> str:
            return f"text {trained.job.key} seed {trained.job.seed}: held-out loss {trained.loss:.4f}"

        found = run_all(train, jobs, options, describe)
        measured = speeds([job for job in jobs if job.folder], bundle, options)
    return [_row(key, [trained for trained in found if trained.job.key == key], measured[key]) for key in chosen]


def _reads_the_future(model: nn.Module, size: Size) -> float:
    """Largest change of the logits of the first half of all windows when the second half is another text."""
    generator = torch.Generator().manual_seed(0)
    ids_BL, other_BL = torch.randint(size.vocab, (2, TEXT_BATCH, size.length), generator=generator)
    half = size.length // 2
    other_BL[:, :half] = ids_BL[:, :half]
    with torch.no_grad():
        found = [model.eval()(input_ids=ids).logits[:, :half] for ids in (ids_BL, other_BL)]
    return float((found[0] - found[1]).abs().max())


def gate(options: Options) -> list[Check]:
    """Active parameters are the dense model's, routers aside, and no model reads the future of its text.

    Whatever the size of the run, at the full size of the model: neither needs training.
    """
    size = QUICK if options.quick else FULL
    torch.manual_seed(TUNING_SEED)
    dense = parameter_counts(make_model(DENSE, STEPS, size))
    checks = []
    for setting in TEXT:
        model = make_model(setting.key, STEPS, size)
        routers = sum(p.numel() for layer in moe_layers(model).values() for p in layer.router.parameters())
        active = parameter_counts(model)["active_params"] - routers
        flops = ffn_flops(setting, STEPS, size)
        ffn = 2 * 3 * TOP_K * size.expert * size.dim  # of two layers, of three matrices
        expected = dense["active_params"] + (flops - 1) * ffn
        name = f"text {setting.key}"
        checks.append(Check(name=f"{name}: active parameters", error=abs(active / expected - 1), limit=1e-3))
        checks.append(Check(name=f"{name}: sees later tokens", error=_reads_the_future(model, size), limit=1e-4))
    return checks
