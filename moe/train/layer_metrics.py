"""Per-layer routing metrics of a step, summed over ranks in one collective.

Legend: E experts.
"""

from typing import Any

import torch

from moe.observe import LayerStats
from moe.parallel.ranks import Ranks
from moe.routers.losses import load_fractions, max_violation


def layer_records(stats: dict[str, LayerStats], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Records for metrics.jsonl by layer number. Collective.

    Counts are summed over ranks and micro-batches; the other numbers are means over them. Entropy is in nats.

    Args:
        stats: of this rank's layers by module name, such as "model.layers.3.mlp", the same names on all ranks.
        ranks: the process group.
    """
    stats = {name: layer for name, layer in stats.items() if layer.counts_E is not None}
    if not stats:
        return {}
    parts = []
    for layer in stats.values():
        assert layer.counts_E is not None
        parts.append(layer.counts_E.double())
        parts.append(torch.stack([value.double() for _, value in sorted(layer.sums.items())]))
    flat = torch.cat(parts)
    if ranks.device.type != "cpu":
        flat = flat.float()
    total = iter(ranks.sum_tensor(flat).tolist())
    records = {}
    for name, layer in stats.items():
        assert layer.counts_E is not None
        counts_E = torch.tensor([next(total) for _ in range(layer.counts_E.numel())])
        sums = {key: next(total) for key in sorted(layer.sums)}
        batches = layer.num_micro_batches * ranks.world_size
        records[_number(name)] = {
            "load": load_fractions(counts_E).tolist(),
            "max_violation": max_violation(counts_E).item(),
            "dropped_fraction": sums["dropped"] / max(sums["assigned"], 1),
            "entropy": sums.get("entropy", 0.0) / batches,
            "logit_norm": sums.get("logit_norm", 0.0) / batches,
            "aux_loss": sums["aux_loss"] / batches,
            "losses": {key[5:]: value / batches for key, value in sums.items() if key.startswith("loss/")},
        }
    return records


def _number(module_name: str) -> str:
    """The layer's number in its module name; the name itself if it has none."""
    return next((part for part in module_name.split(".") if part.isdigit()), module_name)
