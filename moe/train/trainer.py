"""The training loop: batches in, optimizer steps, metrics, evaluation, checkpoints out.

One loop for every layout: what ranks say to each other goes through `Ranks` and `Engine`. A step reads: learning rate,
micro-batches forward and backward, one engine step, one exchange of scalars between ranks, one line of metrics.
"""

import math
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from moe.layer import finish_step, moe_layers
from moe.parallel import checkpoint
from moe.parallel.engine import Engine
from moe.parallel.heartbeat import this_host
from moe.parallel.ranks import Ranks
from moe.parallel.sequence_parallel import SequenceParallel
from moe.parallel.stacks import BusyMeter
from moe.parallel.watchdog import Watchdog
from moe.train.config import RunConfig
from moe.train.data import Batch, BatchLoader, DataBundle, build_data, eval_batches
from moe.train.layer_metrics import layer_records
from moe.train.metrics import MetricsWriter, mean_balance, model_flops_per_token, peak_flops
from moe.train.model import build_config, build_model, give_token_counts, model_difference, parameter_counts
from moe.train.optim import choose_optimizer, learning_rate, param_groups
from moe.train.progress import TrainProgress
from moe.train.run_checkpoints import RunCheckpoints
from moe.train.run_folder import CHECKPOINTS_DIR, device_name, write_run_files
from moe.train.stragglers import StragglerWatch

# Slurm and systemd signal every process of a job, and then the launcher passes its own signal on: one request, not two.
SAME_REQUEST_SECONDS = 5.0


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How `Trainer.fit` ended.

    Attributes:
        finished: all steps are done; False after a signal, with a checkpoint to resume from.
        step: optimizer steps done.
        checkpoint: the newest checkpoint.
        summary: results, as in summary.json.
    """

    finished: bool
    step: int
    checkpoint: Path
    summary: dict[str, Any]


class Trainer:
    """Trains one run on one rank; construct and call `fit` on all ranks.

    Args:
        config: the run.
        ranks: this process among all.
        resume: continue from the newest valid checkpoint in the run's folder, or start if there is none.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, resume: bool) -> None:
        self.config, self.ranks, self.run_dir = config, ranks, config.run_dir
        self.grad_accum = config.grad_accum(ranks.world_size)
        self.sequences = SequenceParallel(config.parallel.sp_size)
        self._data_place = (self.sequences.data_rank, self.sequences.data_size)
        with ranks.main_first():
            self.data: DataBundle = build_data(config.data, *self._data_place)
        self.loader = BatchLoader(self.data.train, config.train.micro_batch_size, *self._data_place, self.grad_accum)
        model_config = build_config(config, self.data.tokenizer)
        model = build_model(config, model_config)
        self.sequences.install(model)
        self.model_config = {"model_type": model_config.model_type, **model_config.to_diff_dict()}
        self.counts = parameter_counts(model)
        decoder = model_config.get_text_config()
        self._flops_per_token = model_flops_per_token(
            self.counts["matmul_params"], decoder.num_hidden_layers, decoder.hidden_size, config.data.seq_len
        )
        groups = param_groups(model, config.optim)
        optimizer = choose_optimizer(config.optim)
        self.engine = Engine(
            model,
            groups,
            optimizer.optimizer_class,
            optimizer.options,
            self._deepspeed_config(),
            config.parallel.ep_size,
            config.parallel.exchange,
        )
        self.model = model
        self.step = self.tokens = self.skipped = self._nonfinite_in_a_row = 0
        self._stop_asked: float | None = None
        self._stop_agreed = False
        self._checkpoints = RunCheckpoints(config, self.engine, self.data.tokenizer, self._event)
        parallel = config.parallel
        self.watchdog = Watchdog(ranks, parallel.stall_seconds, parallel.timeout_seconds, self._report_stall)
        self._busy = BusyMeter()
        torch.manual_seed(config.seed * ranks.world_size + ranks.rank)  # router noise differs between ranks
        self._notes: list[str] = []
        if resume:
            self._resume()
        give_token_counts(model, decoder.vocab_size, self.data.train, ranks)

    def _deepspeed_config(self) -> dict[str, Any]:
        train, parallel = self.config.train, self.config.parallel
        generated = {
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": self.grad_accum,
            "gradient_clipping": self.config.optim.clip,
            "zero_optimization": parallel.zero_optimization,
            "bf16": {"enabled": train.precision == "bf16"},
            "steps_per_print": 2**31,
        }
        return _merge(generated, parallel.deepspeed)

    def _resume(self) -> None:
        root = self.run_dir / CHECKPOINTS_DIR
        found: list[Any] = [None, []]
        if self.ranks.is_main:
            found = list(checkpoint.newest_valid(root))
        path, problems = self.ranks.gather(found)[0]
        self._notes += [f"checkpoint refused: {problem}" for problem in problems]
        if path is None:
            self._notes.append("no valid checkpoint to resume from: starting at step 0")
            return
        if difference := model_difference(checkpoint.read_state(path)["model_config"], self.model_config):
            raise ValueError(
                f"{path} is a checkpoint of another model: {difference}; resume with the config that wrote it, or start "
                "a new run with another name=..."
            )
        state = checkpoint.load(path, self.engine)
        if state["data_fingerprint"] != self.data.fingerprint:
            raise ValueError(
                f"{path} was trained on other data or another tokenizer; resume with the data config of that run"
            )
        self.loader.load_state_dict(state["loader"][self.ranks.rank % len(state["loader"])])
        self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped"]
        self._checkpoints.newest = path
        self._notes.append(f"resumed from step {self.step} ({path.name})")

    def fit(self) -> Outcome:
        """Train to the last step, or until SIGTERM or SIGINT asks to stop; returns with a checkpoint written."""
        config, started = self.config, time.monotonic()
        first_step, last_eval = self.step, None
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self._open_run()
        try:
            self._stragglers = StragglerWatch(self.ranks.gather(this_host()))
            self.watchdog.start(self.step)
            self._busy.start()
            with TrainProgress(config.train.steps, self.ranks.is_main, start_step=self.step) as self._progress:
                for note in self._notes:
                    self._event(note)
                while self.step < config.train.steps and not self._stop_agreed:
                    self._train_step()
                    if config.train.eval_every and self.step % config.train.eval_every == 0:
                        last_eval = self.evaluate()
                    due = config.train.checkpoint_every and self.step % config.train.checkpoint_every == 0
                    if due and not self._nonfinite_in_a_row:  # the older ones may be what the run must go back to
                        self.save()
                finished = self.step >= config.train.steps
                self.watchdog.at(self.step, "checkpoint")
                self._checkpoints.finish()
                if not self._checkpoints.has(self.step):
                    self.save(required=True)
                if finished and (last_eval is None or self.step % max(config.train.eval_every, 1)):
                    last_eval = self.evaluate()
                if not finished:
                    self._event(f"stopped by a signal after step {self.step}: resumable")
        except Exception:
            self._checkpoints.abandon()  # a checkpoint that was being written may still become complete
            raise
        finally:
            self.watchdog.stop()
            self._busy.stop()
            self.sequences.remove()
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._writer is not None:
                self._writer.close()
        newest = self._checkpoints.newest
        assert newest is not None
        seconds = time.monotonic() - started
        summary = {
            "eval_loss": last_eval,
            "perplexity": None if last_eval is None else math.exp(min(last_eval, 700)),
            "steps": self.step,
            "tokens": self.tokens,
            "tokens_per_second": (self.step - first_step) * self._tokens_per_step() / seconds,
            "seconds": seconds,
            "skipped_steps": self.skipped,
            **self.counts,
        }
        return Outcome(finished=finished, step=self.step, checkpoint=newest, summary=summary)

    def _open_run(self) -> None:
        self._writer: MetricsWriter | None = None
        if not self.ranks.is_main:
            return
        config = self.config
        environment = {
            "device": device_name(self.ranks.device),
            "world_size": self.ranks.world_size,
            "ep_size": config.parallel.ep_size,
            "zero_stage": config.parallel.zero_stage,
        }
        write_run_files(self.run_dir, config, environment)
        self._writer = MetricsWriter(
            self.run_dir, config.log.wandb, config.log.wandb_project, config.model_dump(mode="json"), resume=True
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._stop_asked is None:
            self._stop_asked = now
        elif now - self._stop_asked > SAME_REQUEST_SECONDS:  # asked twice: give up at once
            raise KeyboardInterrupt

    def _tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.data.seq_len

    def _train_step(self) -> None:
        started = time.monotonic()
        lr = learning_rate(self.config.optim, self.step, self.config.train.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.watchdog.at(self.step, "loading the batch")
        batches = [self._own_piece(batch) for batch in self.loader.next_step()]
        labels = sum(int((batch.labels_BL != -100).sum()) for batch in batches)
        (total_labels,) = self.ranks.sum([labels])
        per_micro_batch = total_labels / (self.ranks.world_size * self.grad_accum)
        loss = torch.zeros((), device=self.ranks.device)
        for batch in batches:
            self.watchdog.at(self.step, "forward")
            micro_loss = self._loss(batch, per_micro_batch)
            self.watchdog.at(self.step, "backward")
            self.engine.backward(micro_loss)
            self.watchdog.at(self.step, "optimizer step")
            applied = self.engine.step()
            loss += micro_loss.detach()
        # A signal may reach ranks at different steps; they stop together, so that none waits for another.
        own_busy = [0.0] * self.ranks.world_size
        own_busy[self.ranks.rank] = self._busy.take()
        signals = [float(self._stop_asked is not None), float(self._checkpoints.busy)]
        loss_sum, stops, saving, *busy = self.ranks.sum([loss.item(), *signals, *own_busy])
        self._stop_agreed = stops > 0
        for message in self._stragglers.add(busy):
            self._event(message)
        mean_loss = loss_sum / (self.ranks.world_size * self.grad_accum)
        layers = moe_layers(self.model)
        stats = dict(zip(layers, finish_step(layers.values(), applied), strict=True))
        self.step += 1
        self.tokens += self._tokens_per_step()
        if not saving:
            self._checkpoints.finish()
        self._check_finite(applied, loss.item(), mean_loss, batches)
        if self.step % self.config.train.log_every == 0 or self.step == self.config.train.steps:
            records = layer_records(stats, self.ranks)
            seconds = time.monotonic() - started
            self._log_step(lr, mean_loss, seconds, records)

    def _own_piece(self, batch: Batch) -> Batch:
        """What of a batch this rank computes; the mask stays whole, as attention sees whole sequences."""
        piece = self.sequences.piece
        return replace(
            batch,
            input_ids_BL=piece(batch.input_ids_BL),
            labels_BL=piece(batch.labels_BL),
            position_ids_BL=piece(batch.position_ids_BL),
        )

    def _loss(self, batch: Batch, num_items: float) -> Tensor:
        """Summed cross-entropy over ``num_items``."""
        device = self.ranks.device
        mask = None if batch.attention_mask is None else batch.attention_mask.to(device)
        labels_BL = batch.labels_BL.to(device)
        return self.engine.module(
            input_ids=batch.input_ids_BL.to(device),
            position_ids=batch.position_ids_BL.to(device),
            attention_mask=mask,
            labels=labels_BL,
            shift_labels=labels_BL,
            num_items_in_batch=torch.tensor(num_items, device=device),
        ).loss

    def _check_finite(self, applied: bool, own_loss: float, mean_loss: float, batches: list[Batch]) -> None:
        if applied and math.isfinite(mean_loss):
            self._nonfinite_in_a_row = 0
            return
        self.skipped += 1
        self._nonfinite_in_a_row += 1
        limit = self.config.train.max_nonfinite_steps
        what = "loss" if not math.isfinite(mean_loss) else "gradient"
        self._event(f"non-finite {what} at step {self.step}: step skipped ({self._nonfinite_in_a_row} in a row)")
        if self._nonfinite_in_a_row < limit:
            return
        own = (
            []
            if math.isfinite(own_loss) and what == "loss"
            else [d for b in batches for ids in b.document_ids for d in ids]
        )
        documents = sorted({document for ids in self.ranks.gather(own) for document in ids})
        raise TrainingError(
            f"{limit} steps in a row had a non-finite {what}; stopped at step {self.step}. Documents of the last batch: "
            f"{', '.join(documents)}. Look at them, lower optim.lr, or resume from an earlier checkpoint"
        )

    def _log_step(self, lr: float, loss: float, seconds: float, layers: dict[str, Any]) -> None:
        if self._writer is None:
            return
        speed = self._tokens_per_step() / seconds
        peak = peak_flops(self.ranks.device)
        record = {
            "kind": "train",
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": self.engine.grad_norm,
            "tokens": self.tokens,
            "tokens_per_second": speed,
            "mfu": None if peak is None else speed * self._flops_per_token / (peak * self.ranks.world_size),
            "step_seconds": seconds,
            "skipped_steps": self.skipped,
            "aux_loss": sum(layer["aux_loss"] for layer in layers.values()),
            "layers": layers,
        }
        self._writer.log(record)
        self._progress.update(self.step, loss, speed, mean_balance(layers.values()))

    def _event(self, message: str) -> None:
        if self._writer is not None:
            self._writer.log({"kind": "event", "step": self.step, "message": message})
            self._progress.message(message)

    def _report_stall(self, message: str) -> None:
        """Runs beside the training, which does not go on: on the rank that speaks, whose main thread waits."""
        if self._writer is not None:
            self._writer.log({"kind": "event", "step": self.step, "message": message})
        print(message, file=sys.stderr, flush=True)

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean held-out loss over at most ``train.eval_windows`` windows; None when nothing is held out. Collective."""
        if self.data.evaluation is None:
            return None
        train = self.config.train
        self.watchdog.at(self.step, "evaluation")
        self.engine.module.eval()
        loss_sum, count = 0.0, 0
        for batch in eval_batches(self.data.evaluation, train.micro_batch_size, *self._data_place, train.eval_windows):
            batch = self._own_piece(batch)
            loss_sum += self._loss(batch, 1.0).item()
            count += int((batch.labels_BL != -100).sum())
        self.engine.module.train()
        loss_sum, total = self.ranks.sum([loss_sum, count])
        loss = loss_sum / total
        if self._writer is not None:
            self._writer.log({"kind": "eval", "step": self.step, "loss": loss, "perplexity": math.exp(min(loss, 700))})
            self._progress.message(
                f"step {self.step}: held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}"
            )
        return loss

    def save(self, required: bool = False) -> None:
        """Write a checkpoint, while training goes on unless it is ``required``; then a failure is an error. Collective."""
        self.watchdog.at(self.step, "checkpoint")
        state = {
            "tokens": self.tokens,
            "skipped": self.skipped,
            "loader": self.ranks.gather(self.loader.state_dict()),
            "data_fingerprint": self.data.fingerprint,
            "model_config": self.model_config,
            "ep_size": self.config.parallel.ep_size,
            "zero_stage": self.config.parallel.zero_stage,
        }
        problem = self._checkpoints.save(self.step, state, wait=required)
        if problem is not None and required:
            raise TrainingError(problem)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
