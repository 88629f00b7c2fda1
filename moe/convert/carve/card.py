"""The model card of a carved model."""

import shlex
import statistics

from moe.convert.carve.options import CarveOptions
from moe.convert.carve.run import Carved
from moe.convert.model_card import CARD, ModelCard, render_card
from moe.models.folder import ModelFolder

SUMMARIES = {
    "best": "Neurons are grouped by what the output loses without them, and a linear gate is fitted to the groups.",
    "cmoe": "Neurons that fire for the same tokens are grouped into experts (CMoE, arXiv 2502.04416).",
    "weaver": "Neurons whose gates open on the same texts are grouped into experts (ExpertWeaver, arXiv 2602.15521).",
    "llama-moe": "Neurons are dealt out to experts at random (LLaMA-MoE).",
    "static": "The same neurons run for every token: a pruned model in the form of an MoE, to compare carvings with.",
}


def describe(
    carved: Carved, source: ModelFolder, options: CarveOptions, to: str, command: list[str], calibration: str
) -> dict[str, str]:
    """README.md by its name.

    Args:
        carved: what came out.
        source: the dense model.
        options: the method and what it was told.
        to: the format.
        command: words of the command that makes it again.
        calibration: what text the experts come from, in words.
    """
    checks: dict[str, object] = {
        "share of the FFNs' output energy kept on calibration text, mean over layers": _mean(carved, "energy_kept"),
        "of the best experts of a token, share that the gate chooses, mean over layers": _mean(carved, "recall"),
    }
    if (found := carved.comparison) is not None:
        checks |= {
            "largest difference of a logit, in fp32": f"{found.max_diff:.2e}",
            "root mean square of the source's logits": f"{found.reference_rms:.2f}",
            "mean KL divergence per token, nats": f"{found.kl:.2e}",
            "tokens with the same most likely next token": f"{found.same_top1:.1%}",
            "tokens compared": found.tokens,
        }
    card = ModelCard(
        title=carved.out.name,
        kind="carved",
        command=shlex.join(command),
        sources=[source],
        summary=SUMMARIES[options.method],
        config=carved.config,
        to=to,
        options={
            "method": options.method,
            "gate": options.gate,
            "refit": options.refit,
            "sequential": options.sequential,
            "seed": options.seed,
            "calibration": calibration,
        },
        checks=checks,
        notes=["Fewer parameters run per token than in the source; the model's function is not kept."],
    )
    return {CARD: render_card(card)}


def _mean(carved: Carved, name: str) -> str:
    return f"{statistics.fmean(getattr(layer.quality, name) for layer in carved.layers):.1%}"
