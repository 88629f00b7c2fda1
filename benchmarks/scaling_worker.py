"""What one of two ranks holds in real steps of the tiny recipe, in several layouts: ``scaling_worker CASES.json OUT.json``."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import ROOT
from moe.models import MoEConfig, MoEForCausalLM
from moe.parallel.engine import Engine
from moe.parallel.ranks import init_ranks, leave
from moe.scaling.measure import measure_step
from moe.scaling.shape import Layout, ModelShape
from moe.train.config import RunConfig, load_config
from moe.train.optim import param_groups
from moe.train.plan import model_shape

RECIPE = ROOT / "configs" / "tiny.yaml"
BUCKET = 500_000  # elements; DeepSpeed's default of 500 million would hide everything else of a small model
WORLD = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layout that is measured and planned."""

    ep_size: int
    zero_stage: int
    precision: str
    micro_batch_size: int
    grad_accum: int
    recompute: bool

    @property
    def layout(self) -> Layout:
        return Layout(
            world_size=WORLD,
            ep_size=self.ep_size,
            zero_stage=self.zero_stage,
            micro_batch_size=self.micro_batch_size,
            grad_accum=self.grad_accum,
            precision=self.precision,
            activation_checkpointing=self.recompute,
            zero={"reduce_bucket_size": BUCKET},
        )


def recipe() -> tuple[RunConfig, ModelShape]:
    """The recipe, and the model that it makes."""
    config = load_config(RECIPE)
    return config, model_shape(config)


def _engine(case: Case) -> Engine:
    config, shape = recipe()
    assert shape.moe is not None
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig(text_config=shape.decoder, moe=shape.moe.to_dict())).train()
    model.config.use_cache = False
    if case.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = {
        "train_micro_batch_size_per_gpu": case.micro_batch_size,
        "gradient_accumulation_steps": case.grad_accum,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.zero_stage, "reduce_bucket_size": BUCKET},
        "bf16": {"enabled": case.precision == "bf16"},
        "steps_per_print": 2**31,
    }
    groups = param_groups(model, config.optim)
    return Engine(model, groups, torch.optim.AdamW, {"lr": 1e-3, "fused": True}, settings, case.ep_size)


def _batch(case: Case) -> dict[str, Any]:
    _, shape = recipe()
    ids_BL = torch.randint(shape.decoder.vocab_size, (case.micro_batch_size, shape.seq_len))
    return {
        "input_ids": ids_BL,
        "position_ids": torch.arange(shape.seq_len).expand(case.micro_batch_size, -1),
        "labels": ids_BL,
        "shift_labels": ids_BL,
        "num_items_in_batch": torch.tensor(float(ids_BL.numel())),
    }


def main(arguments: list[str]) -> None:
    """Measure every case, and let rank 0 write its own findings."""
    cases_path, out = arguments
    cases = [Case(**values) for values in json.loads(Path(cases_path).read_text(encoding="utf-8"))]
    ranks, found = init_ranks("cpu", timeout_seconds=600), []
    for case in cases:
        made: list[nn.Module] = []

        def engine(case: Case = case, made: list[nn.Module] = made) -> Engine:
            result = _engine(case)
            made.append(result.module)
            return result

        found.append(asdict(measure_step(engine, lambda case=case: _batch(case), case.grad_accum)))
        made[-1].destroy()  # type: ignore[operator]
    if ranks.is_main:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    ranks.barrier()
    leave()


if __name__ == "__main__":
    main(sys.argv[1:])
