"""Finished run folders as data for scaling laws."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import AutoConfig

from moe.layer import moe_layers
from moe.models import MoEConfig
from moe.scaling.laws.own import TrainedRun, read_runs_csv
from moe.scaling.shape import ModelShape
from moe.train.model import parameter_counts
from moe.train.run_folder import CONFIG_FILE, MODEL_DIR, SUMMARY_FILE

# Losses of runs that differ in one of these are of different texts, or per another kind of token.
_SAME_DATA = ("source", "hub_config", "split", "text_column", "eval_fraction", "seq_len", "tokenizer")


def law_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of a model as scaling laws count them.

    "active" with embedding and head but without routers, as in the papers' formulas; "active_blocks" and "total_blocks" without
    embedding and head; "embedding" of both, once where they are tied; "routing".
    """
    counts = parameter_counts(model)
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    embedding = sum({id(table.weight): table.weight.numel() for table in tables}.values())
    routing = sum(parameter.numel() for layer in moe_layers(model).values() for parameter in layer.router.parameters())
    return {
        "active": counts["active_params"] - routing,
        "active_blocks": counts["active_params"] - embedding - routing,
        "total_blocks": counts["total_params"] - embedding - routing,
        "total": counts["total_params"],
        "embedding": embedding,
        "routing": routing,
    }


def read_runs(paths: Sequence[Path]) -> list[TrainedRun]:
    """Runs from run folders and CSV files.

    Raises:
        ValueError: a path is neither, a run is not finished or was not evaluated, or runs are of different data.
    """
    found: list[TrainedRun] = []
    data: dict[str, Any] | None = None
    for path in paths:
        if path.is_file() and path.suffix == ".csv":
            found += read_runs_csv(path)
            continue
        found.append(_read_run(path))
        own = yaml.safe_load((path / CONFIG_FILE).read_text(encoding="utf-8"))["data"]
        own = {key: own.get(key) for key in _SAME_DATA}
        if data is not None and own != data:
            key = next(key for key in _SAME_DATA if own[key] != data[key])
            raise ValueError(
                f"losses of {path} and {paths[0]} cannot be compared: data.{key} is {own[key]!r} and {data[key]!r}"
            )
        data = own
    return found


def _read_run(path: Path) -> TrainedRun:
    if not (path / SUMMARY_FILE).is_file():
        raise ValueError(f"{str(path)!r} is no folder of a finished run ({SUMMARY_FILE} is missing) and no .csv file")
    summary = json.loads((path / SUMMARY_FILE).read_text(encoding="utf-8"))
    if not summary["finished"]:
        raise ValueError(f"{path} was stopped at step {summary['steps']}; finish it with --resume, or leave it out")
    if summary["eval_loss"] is None:
        raise ValueError(f"{path} has no held-out loss: its data.eval_fraction is 0; leave it out")
    config = AutoConfig.from_pretrained(path / MODEL_DIR)
    spec = config.spec if isinstance(config, MoEConfig) else None
    model = ModelShape(decoder=config.get_text_config(), moe=spec, seq_len=1).build()
    counts = law_counts(model)
    layers = list(moe_layers(model).values())
    expansion = granularity = 1.0
    if layers:
        shared = layers[0].spec.num_shared_experts
        granularity = layers[0].router.mean_experts_per_token + shared
        expansion = (layers[0].num_experts + shared) / granularity
    return TrainedRun(
        name=path.name,
        active=counts["active"],
        total_blocks=counts["total_blocks"],
        tokens=summary["tokens"],
        expansion=expansion,
        granularity=granularity,
        loss=summary["eval_loss"],
    )
