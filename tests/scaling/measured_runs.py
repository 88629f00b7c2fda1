"""Two gloo ranks that train real steps in several layouts and count what they hold; and the plans for the same."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from moe.layer import MoESpec
from moe.models import MoEConfig, MoEForCausalLM
from moe.parallel.engine import Engine
from moe.scaling.dry_run import simulated_model, step_bytes
from moe.scaling.measure import MeasuredStep, measure_step
from moe.scaling.memory import MemoryPlan, engine_bytes, plan_memory
from moe.scaling.shape import Layout, ModelShape, OwnedParameters, decoder_config, owned_parameters
from moe.train.config import OptimConfig
from moe.train.optim import param_groups

L = 64
BUCKET = 100_000  # elements; DeepSpeed's default would hide everything else of a small model

DECODER: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": L,
}
SPEC = MoESpec(
    num_experts=8,
    expert_hidden=128,
    num_shared_experts=1,
    first_dense_layers=1,
    router={"name": "topk", "top_k": 2},
)


def shape() -> ModelShape:
    config: PreTrainedConfig = decoder_config(DECODER)
    return ModelShape(decoder=config, moe=SPEC, seq_len=L)


@dataclass(frozen=True, kw_only=True)
class Case:
    ep_size: int
    zero_stage: int
    precision: str = "bf16"
    micro_batch_size: int = 2
    grad_accum: int = 1
    recompute: bool = False
    max_live: int = 10**9

    @property
    def layout(self) -> Layout:
        return Layout(
            world_size=2,
            ep_size=self.ep_size,
            zero_stage=self.zero_stage,
            micro_batch_size=self.micro_batch_size,
            grad_accum=self.grad_accum,
            precision=self.precision,
            activation_checkpointing=self.recompute,
            zero={"reduce_bucket_size": BUCKET, "stage3_max_live_parameters": self.max_live},
        )


def plan(case: Case) -> MemoryPlan:
    """The plan of rank 0."""
    engine = engine_bytes(rank_parameters(case), case.layout, rank=0)
    return plan_memory(engine, step_bytes(shape(), case.layout), case.layout)


def rank_parameters(case: Case) -> OwnedParameters:
    with simulated_model(shape(), case.layout) as (model, _):
        return owned_parameters(model, optimizer_groups(model), total=0)


def optimizer_groups(model: nn.Module) -> list[list[str]]:
    return [group["params"] for group in param_groups(model, OptimConfig())]


def measure(rank: int, world_size: int, cases: list[Case]) -> list[MeasuredStep]:
    return [_measure_one(case) for case in cases]


def make_engine(case: Case, zero: dict[str, int] | None = None) -> Engine:
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig(text_config=decoder_config(DECODER), moe=SPEC.to_dict()))
    model.config.use_cache = False
    if case.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = {
        "train_micro_batch_size_per_gpu": case.micro_batch_size,
        "gradient_accumulation_steps": case.grad_accum,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.zero_stage, "reduce_bucket_size": BUCKET, **(zero or {})},
        "bf16": {"enabled": case.precision == "bf16"},
        "steps_per_print": 2**31,
    }
    groups = param_groups(model.train(), OptimConfig())
    return Engine(model, groups, torch.optim.AdamW, {"lr": 1e-3, "fused": True}, config, case.ep_size)


def make_batch(case: Case) -> dict[str, Any]:
    ids_BL = torch.randint(DECODER["vocab_size"], (case.micro_batch_size, L))
    return {
        "input_ids": ids_BL,
        "position_ids": torch.arange(L).expand(case.micro_batch_size, -1),
        "labels": ids_BL,
        "shift_labels": ids_BL,
        "num_items_in_batch": torch.tensor(float(ids_BL.numel())),
    }


def _measure_one(case: Case) -> MeasuredStep:
    made: list[Engine] = []

    def engine() -> Engine:
        made.append(make_engine(case))
        return made[-1]

    try:
        return measure_step(engine, lambda: make_batch(case), case.grad_accum)
    finally:
        made[-1].module.destroy()


# What a ring sends of an operation's first or second argument, in passes of (W - 1) / W.
RING = {"allreduce_": (2, 0), "_allgather_base_": (1, 0), "_reduce_scatter_base_": (1, 1)}


class CountedCollectives(TorchDispatchMode):
    """Bytes that a ring over two ranks sends, by operation of DeepSpeed; scalars and the exchange are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in RING:
            passes, index = RING[name]
            tensors = [
                leaf for leaf in tree_leaves(args[index]) if isinstance(leaf, torch.Tensor) and leaf.numel() > 64
            ]
            alone = any(dist.get_world_size(group) == 1 for group in _groups(args))
            self.sent[name] += 0 if alone else passes * sum(tensor.nbytes for tensor in tensors) // 2
        return func(*args, **(kwargs or {}))


def _groups(args: Any) -> list[dist.ProcessGroup]:
    boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
    return [dist.ProcessGroup.unbox(arg) for arg in boxed]


def count_collectives(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, int]]:
    return [_count(case) for case in cases]


def _count(case: Case) -> dict[str, int]:
    engine = make_engine(case, {"stage3_param_persistence_threshold": 0})
    counted = CountedCollectives()
    for _ in range(2):
        counted.sent.clear()
        with counted:
            for _ in range(case.grad_accum):
                engine.backward(engine.module(**make_batch(case)).loss)
                engine.step()
    engine.module.destroy()
    return dict(counted.sent)
