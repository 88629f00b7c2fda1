"""``moe trace``: which experts a trained model chooses on the data of its run."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from moe.scaling.trace import RoutingTrace, recording
from moe.train.config import load_config
from moe.train.data import build_data, eval_batches
from moe.train.run_folder import CONFIG_FILE, MODEL_DIR


@torch.no_grad()
def trace_run(run: Path, num_batches: int) -> RoutingTrace:
    """The choices of a finished run's model on its held-out windows, without the routers' training noise.

    Raises:
        ValueError: the folder is no finished run, holds nothing out, or its model's routing cannot be traced.
    """
    if not (run / CONFIG_FILE).is_file() or not (run / MODEL_DIR).is_dir():
        raise ValueError(f"{str(run)!r} is no finished run; give the folder that `moe train` wrote, runs/NAME")
    config = load_config(run / CONFIG_FILE)
    model = AutoModelForCausalLM.from_pretrained(run / MODEL_DIR, dtype=torch.float32).eval()
    evaluation = build_data(config.data).evaluation
    if evaluation is None:
        raise ValueError("the run holds nothing out (data.eval_fraction=0), and a trace is made of held-out windows")
    size = config.train.micro_batch_size
    with recording(model) as recorder:
        for batch in eval_batches(evaluation, size, 0, 1, num_batches * size):
            model(
                input_ids=batch.input_ids_BL,
                position_ids=batch.position_ids_BL,
                attention_mask=batch.attention_mask,
                use_cache=False,
            )
    return recorder.trace(config.name)
