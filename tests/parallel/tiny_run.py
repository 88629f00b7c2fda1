"""A tiny MoE language model and its training, for tests of whole training steps: in plain PyTorch, and through `Engine`.

Both see the same batches: ragged sequences, so that ranks differ in their numbers of tokens. Micro-batches of the whole
step are cut into as many pieces as there are ranks.

Legend: B sequences, L sequence length, W ranks.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig

from moe.experts import set_ffn_options
from moe.layer import moe_layers
from moe.models import MoEConfig, MoEForCausalLM
from moe.parallel.engine import Engine, is_expert_parameter
from moe.parallel.sequence_parallel import SequenceParallel
from moe.parallel.state import full_gradient
from moe.types import FFNOptions

VOCAB, B, L = 61, 8, 12
NUM_EXPERTS = 8


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, whatever the layout.

    Attributes:
        router, balance, moe: parts of the `MoESpec`.
        steps, grad_accum, clip, lr: of the training; the rate rises over the first 4 steps.
        ragged: pad the sequences to different lengths.
        checkpointing: activation checkpointing.
        recompute: make the experts' pre-activation again in backward.
        bf16: compute in bfloat16 through DeepSpeed.
        sabotage: a deliberate error, see `_sabotage`.
    """

    router: dict[str, Any] = field(default_factory=lambda: {"name": "topk", "top_k": 2})
    balance: dict[str, Any] = field(
        default_factory=lambda: {"aux_coef": 0.1, "aux_scope": "global_batch", "z_coef": 0.01}
    )
    moe: dict[str, Any] = field(default_factory=dict)
    steps: int = 20
    grad_accum: int = 1
    clip: float = 0.5
    lr: float = 1e-3
    ragged: bool = True
    checkpointing: bool = False
    recompute: bool = False
    bf16: bool = False
    sabotage: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread."""

    world_size: int
    ep_size: int
    zero_stage: int
    sp_size: int = 1
    offload: str = ""

    @property
    def name(self) -> str:
        """For test ids."""
        extra = (f"-sp_{self.sp_size}" if self.sp_size > 1 else "") + (f"-{self.offload}" if self.offload else "")
        return f"{self.world_size}_ranks-ep_{self.ep_size}-zero_{self.zero_stage}{extra}"

    @property
    def zero_optimization(self) -> dict[str, Any]:
        """DeepSpeed's section."""
        return {"stage": self.zero_stage} | {f"offload_{what}": {"device": "cpu"} for what in self.offload.split()}


@dataclass
class Trace:
    """What a rank saw.

    Attributes:
        losses: mean loss of each step over all ranks.
        norms: gradient norm before clipping.
        gradients: of the first two steps, by parameter name; of experts, this rank's.
        biases: selection biases by module name at the end.
        expert_slice: the experts that this rank holds.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    expert_slice: slice = field(default_factory=lambda: slice(0, NUM_EXPERTS))

    @property
    def num_local_experts(self) -> int:
        return self.expert_slice.stop - self.expert_slice.start


def build_model(run: Run, seed: int = 0, **decoder: Any) -> MoEForCausalLM:
    """Three layers, the first one dense; experts and routers are large enough to matter from the first step."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": L,
        "initializer_range": 0.15,
    }
    text_config = AutoConfig.for_model("llama", **{**sizes, **decoder})
    spec = {"num_experts": NUM_EXPERTS, "expert_hidden": 8, "num_shared_experts": 1, "first_dense_layers": 1}
    torch.manual_seed(seed)
    config = MoEConfig(text_config=text_config, moe={**spec, "router": run.router, "balance": run.balance, **run.moe})
    model = MoEForCausalLM(config)
    model.config.use_cache = False
    set_ffn_options(model, FFNOptions(recompute=run.recompute))
    if run.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As the trainer's: vectors do not decay."""
    named = list(model.named_parameters())
    return [
        {"name": "decay", "params": [n for n, p in named if p.dim() >= 2], "weight_decay": 0.1},
        {"name": "no_decay", "params": [n for n, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]


def optimizer_options(run: Run) -> dict[str, Any]:
    return {"lr": run.lr, "betas": (0.9, 0.95), "eps": 1e-6, "fused": True}


def learning_rate(run: Run, step: int) -> float:
    return run.lr * min(1.0, (step + 1) / 4)


def micro_batches(run: Run, step: int, rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """This rank's micro-batches of a step; the first token of each sequence tells the others, so there is much to learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    found, num_items = [], 0
    for _ in range(run.grad_accum):
        first_B1 = torch.randint(VOCAB, (B, 1), generator=generator)
        ids_BL = (first_B1 + torch.arange(L) * (first_B1 % 3 + 1)) % VOCAB
        lengths_B1 = torch.randint(2 if run.ragged else L, L + 1, (B, 1), generator=generator)
        mask_BL = torch.arange(L) < lengths_B1
        labels_BL = ((ids_BL + first_B1 % 3 + 1) % VOCAB).masked_fill(~mask_BL, -100)
        num_items += int(mask_BL.sum())
        mine = slice(rank * B // world_size, (rank + 1) * B // world_size)
        found.append(
            {"input_ids": ids_BL[mine], "attention_mask": mask_BL[mine].long(), "shift_labels": labels_BL[mine]}
        )
    for batch in found:
        batch["num_items_in_batch"] = torch.tensor(num_items / (run.grad_accum * world_size))
    return found


def train_plain(run: Run) -> Trace:
    """The truth: one process, no engine, no process group."""
    model, trace = build_model(run), Trace()
    named = dict(model.named_parameters())
    groups = [{**group, "params": [named[name] for name in group["params"]]} for group in param_groups(model)]
    optimizer = torch.optim.AdamW(groups, **optimizer_options(run))
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run, step)
        loss_sum = 0.0
        for batch in micro_batches(run, step, 0, 1):
            loss = model(**batch).loss
            (loss / run.grad_accum).backward()
            loss_sum += loss.item()
        trace.losses.append(loss_sum / run.grad_accum)
        if step < 2:
            trace.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        trace.norms.append(float(nn.utils.clip_grad_norm_(list(named.values()), run.clip)))
        optimizer.step()
        optimizer.zero_grad()
        for layer in moe_layers(model).values():
            layer.finish_step()
    trace.biases = biases(model)
    return trace


def biases(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("bias_E")}


def make_engine(
    run: Run,
    ep_size: int,
    zero_stage: int,
    model: MoEForCausalLM | None = None,
    zero_optimization: dict[str, Any] | None = None,
) -> Engine:
    """As the trainer makes it."""
    model = model or build_model(run)
    config = {
        "train_micro_batch_size_per_gpu": B // dist.get_world_size(),
        "gradient_accumulation_steps": run.grad_accum,
        "gradient_clipping": run.clip,
        "zero_optimization": zero_optimization or {"stage": zero_stage},
        "bf16": {"enabled": run.bf16},
        "steps_per_print": 2**31,
    }
    return Engine(model, param_groups(model), torch.optim.AdamW, optimizer_options(run), config, ep_size)


def pieces(batch: dict[str, Tensor], sequences: SequenceParallel) -> dict[str, Tensor]:
    """This rank's part of a micro-batch that it shares with others."""
    num_items = batch["num_items_in_batch"] / sequences.size
    batch = {**batch, "position_ids": torch.arange(L).expand_as(batch["input_ids"])}
    found = {name: sequences.piece(tensor) for name, tensor in batch.items() if tensor.dim() == 2}
    return {**found, "num_items_in_batch": num_items}


def train_step(run: Run, engine: Engine, step: int, trace: Trace, sequences: SequenceParallel | None = None) -> None:
    """One step as in the trainer, noted in ``trace``."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(run, step)
    loss_sum = torch.zeros(())
    if sequences is None:
        batches = micro_batches(run, step, rank, world_size)
    else:
        whole = micro_batches(run, step, sequences.data_rank, sequences.data_size)
        batches = [pieces(batch, sequences) for batch in whole]
    for index, batch in enumerate(batches):
        loss = engine.module(**batch).loss
        engine.backward(loss)
        if step < 2 and index == run.grad_accum - 1:
            trace.gradients.append({name: full_gradient(p).clone() for name, p in engine.named_parameters()})
        assert engine.step()
        loss_sum += loss.detach().float()
    dist.all_reduce(loss_sum)
    trace.losses.append(loss_sum.item() / (world_size * run.grad_accum))
    trace.norms.append(engine.grad_norm)
    for layer in moe_layers(engine.model).values():
        layer.finish_step()


def train_layout(run: Run, layout: Layout) -> Trace:
    """The same through the engine, on every rank of the process group."""
    ep_size = layout.ep_size
    engine = make_engine(run, ep_size, layout.zero_stage, zero_optimization=layout.zero_optimization)
    trace, sequences = Trace(), SequenceParallel(layout.sp_size)
    sequences.install(engine.model)
    if run.sabotage is not None:
        _sabotage(run.sabotage, engine.model)
    for step in range(run.steps):
        train_step(run, engine, step, trace, sequences)
    sequences.remove()
    trace.biases = biases(engine.model)
    local = NUM_EXPERTS // ep_size
    first = dist.get_rank() % ep_size * local
    trace.expert_slice = slice(first, first + local)
    engine.module.destroy()
    return trace


def _sabotage(kind: str, model: nn.Module) -> None:
    for layer in moe_layers(model).values():
        if kind == "router_detached":
            weigh = layer.router.weigh
            layer.router.weigh = lambda *args, weigh=weigh: weigh(*args).detach()
        elif kind == "expert_gradients_doubled":
            for parameter in layer.experts.parameters():
                assert not is_expert_parameter(parameter) or parameter.allreduce is False
                parameter.register_hook(lambda gradient: gradient * 2)
        elif kind == "counts_not_reduced":
            layer.reduce_counts = None
        else:
            raise ValueError(kind)
