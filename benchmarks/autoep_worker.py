"""One rank of ``autoep``: python -m benchmarks.autoep_worker PLAN.json OUT.json (see `benchmarks.autoep`).

Both models are made from the same weights, stepped by DeepSpeed with the same optimizer, and timed in turns in the same
processes. Bytes are counted where both hand them to `torch.distributed`.

Legend: B sequences, L length, D model, V vocabulary.
"""

import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import output_capturing

from moe.layer import moe_layers
from moe.models import MoEConfig, MoEForCausalLM
from moe.parallel.engine import Engine
from moe.parallel.ranks import init_ranks, leave

LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes, as `benchmarks.autoep` asks for them."""

    dim: int
    num_layers: int
    num_experts: int
    top_k: int
    hidden: int
    vocab: int
    batch: int
    length: int
    repeats: int
    steps_compared: int
    bf16: bool


class _Sent:
    """Bytes handed to all-to-all for other ranks."""

    total = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        inner, rank = dist.all_to_all_single, dist.get_rank()
        signature = inspect.signature(inner)

        def counted(*arguments: Any, **named: Any) -> Any:
            call = signature.bind(*arguments, **named).arguments
            rows, splits = call["input"], call.get("input_split_sizes")
            ranks = dist.get_process_group_ranks(call.get("group") or dist.group.WORLD)
            own = splits[ranks.index(rank)] if splits else rows.shape[0] // len(ranks)
            self.total += (rows.shape[0] - own) * rows[:1].numel() * rows.element_size()
            return inner(*arguments, **named)

        with mock.patch.object(dist, "all_to_all_single", counted):
            yield


def _theirs(plan: Plan, zero_stage: int) -> tuple[Any, dict[str, Tensor]]:
    """DeepSpeed's engine around transformers' model with AutoEP, and the weights before."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_decoder(plan),
            moe_intermediate_size=plan.hidden,
            num_experts=plan.num_experts,
            num_experts_per_tok=plan.top_k,
            norm_topk_prob=True,
        )
    ).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = _engine_config(plan, zero_stage) | {
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LR, "weight_decay": WEIGHT_DECAY, "torch_adam": True, "adam_w_mode": True},
        },
        "expert_parallel": {
            "enabled": True,
            "autoep_size": dist.get_world_size(),
            "preset_model": "qwen3_moe",
            "load_balance_coeff": None,
        },
    }
    # DeepSpeed 0.19.8 gives a default to a method that takes none in transformers 5.23.
    registry = type(output_capturing._CAN_RECORD_REGISTRY)
    lookup = registry.get
    with mock.patch.object(registry, "get", lambda self, key, default=None: lookup(self, key) or default):
        engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine, weights


def _decoder(plan: Plan) -> dict[str, Any]:
    heads = plan.dim // 64
    return {
        "vocab_size": plan.vocab,
        "hidden_size": plan.dim,
        "intermediate_size": plan.hidden,
        "num_hidden_layers": plan.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 64,
        "max_position_embeddings": plan.length,
        "tie_word_embeddings": False,
        "use_cache": False,
        "initializer_range": 0.05,
    }


def _engine_config(plan: Plan, zero_stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": plan.batch,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": plan.bf16},
        "steps_per_print": 2**31,
    }


def _ours(plan: Plan, zero_stage: int, weights: dict[str, Tensor]) -> Engine:
    spec = {
        "num_experts": plan.num_experts,
        "expert_hidden": plan.hidden,
        "router": {"name": "topk", "top_k": plan.top_k},
        "balance": {"aux_coef": 0.0},
    }
    model = MoEForCausalLM(MoEConfig(text_config=Qwen3Config(**_decoder(plan)), moe=spec)).train()
    model.load_state_dict({name.replace(".mlp.gate.", ".mlp.router."): tensor for name, tensor in weights.items()})
    groups = [{"name": "all", "params": [name for name, _ in model.named_parameters()], "weight_decay": WEIGHT_DECAY}]
    options = {"lr": LR, "fused": False}  # as theirs, which DeepSpeed makes
    config = _engine_config(plan, zero_stage)
    return Engine(model, groups, torch.optim.AdamW, options, config, dist.get_world_size())


def _tokens(plan: Plan, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randint(plan.vocab, (plan.batch, plan.length), generator=generator)


Step = Callable[[int], Tensor]


def _steps(plan: Plan, theirs: Any, ours: Engine) -> dict[str, Step]:
    def their_step(step: int) -> Tensor:
        ids_BL = _tokens(plan, step)
        loss = theirs(input_ids=ids_BL, labels=ids_BL).loss
        theirs.backward(loss)
        theirs.step()
        return loss.detach()

    def our_step(step: int) -> Tensor:
        ids_BL = _tokens(plan, step)
        loss = ours.module(input_ids=ids_BL, labels=ids_BL).loss
        ours.backward(loss)
        ours.step()
        return loss.detach()

    return {"AutoEP": their_step, "moe": our_step}


def _layers(plan: Plan, theirs: Any, ours: Engine) -> dict[str, Step]:
    """Forward and backward of one MoE layer on its own."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    their_layer = next(module for module in theirs.module.modules() if isinstance(module, AutoEPMoELayer))
    our_layer = next(iter(moe_layers(ours.model).values()))

    def passes(layer: nn.Module) -> Step:
        def run(step: int) -> Tensor:
            generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
            dtype = torch.bfloat16 if plan.bf16 else torch.float32
            x_BLD, dy_BLD = torch.randn(2, plan.batch, plan.length, plan.dim, generator=generator).to(dtype)
            x_BLD.requires_grad_()
            found = layer(x_BLD)
            y_BLD = found[0] if isinstance(found, tuple) else found
            y_BLD.backward(dy_BLD)
            layer.zero_grad(set_to_none=True)
            assert x_BLD.grad is not None
            return torch.stack([y_BLD.detach(), x_BLD.grad]).float()

        return run

    return {"AutoEP": passes(their_layer), "moe": passes(our_layer)}


def _measure(functions: dict[str, Step], repeats: int, first: int, sent: _Sent) -> dict[str, Any]:
    """Seconds of each repeat, from all ranks ready to all ranks done, and bytes of one call, summed over ranks."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    num_bytes: dict[str, int] = {}
    for repeat in range(-1, repeats):
        for name, function in functions.items():
            dist.barrier()
            before, started = sent.total, time.perf_counter()
            function(first + repeat + 1)
            dist.barrier()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - started)
                counted = torch.tensor(sent.total - before)
                dist.all_reduce(counted)
                num_bytes[name] = int(counted)
    return {name: {"seconds": seconds[name], "bytes": num_bytes[name]} for name in functions}


def main(arguments: list[str]) -> None:
    """Compare, measure, and let rank 0 write what was found."""
    plan_path, out = arguments
    plan = Plan(**json.loads(Path(plan_path).read_text(encoding="utf-8")))
    ranks, sent = init_ranks("cpu", timeout_seconds=600), _Sent()
    found: dict[str, Any] = {}
    with sent.counting():
        theirs, weights = _theirs(plan, 0)
        layers = _layers(plan, theirs, _ours(plan, 0, weights))
        got, expected = layers["moe"](0), layers["AutoEP"](0)
        found["layer_error"] = max(ranks.gather(((got - expected).norm() / expected.norm()).item()))
        found["layer"] = _measure(layers, plan.repeats, 0, sent)
        del theirs, layers
        theirs, weights = _theirs(plan, 1)
        steps = _steps(plan, theirs, _ours(plan, 1, weights))
        losses = {
            name: [ranks.gather(step(i).item()) for i in range(plan.steps_compared)] for name, step in steps.items()
        }
        found["losses"] = losses
        found["step"] = _measure(steps, plan.repeats, plan.steps_compared, sent)
    if ranks.is_main:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    ranks.barrier()
    leave()


if __name__ == "__main__":
    main(sys.argv[1:])
