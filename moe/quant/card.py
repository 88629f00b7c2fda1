"""The model card of a quantised model."""

import shlex
import statistics
from collections.abc import Sequence

from moe.convert.model_card import CARD, ModelCard, render_card
from moe.quant.plan import Plan
from moe.quant.report import QuantReport
from moe.quant.schemes import COMPRESSED_TENSORS, SIMULATED

_NOTES = {
    COMPRESSED_TENSORS: "Routers, norms and embeddings are not quantized.",
    SIMULATED: "No server computes this scheme: `moe eval` and `moe generate` simulate it, in floating point on rounded values.",
}


def describe(report: QuantReport, plan: Plan, title: str, command: Sequence[str]) -> dict[str, str]:
    """README.md by its name.

    Args:
        report: what was measured.
        plan: what was made.
        title: the model's name.
        command: words of the command that makes it again.
    """
    layers, options = report.layers, plan.options
    agreement = [layer.router_agreement for layer in layers if layer.router_agreement is not None]
    checks: dict[str, object] = {
        "size of the weights": f"{report.bytes_after / 1e6:.1f} MB, {report.bytes_before / 1e6:.1f} MB before",
        "relative error of a matrix's output, mean": f"{statistics.fmean(m.error for la in layers for m in la.matrices):.4f}",
        "relative error of the residual stream after the last layer": f"{layers[-1].stream_error:.4f}",
        "experts of a token that stay the same, mean over layers": f"{statistics.fmean(agreement):.1%}",
    }
    if (found := report.checks.get("verification")) is not None:
        checks["tensors scanned for values that are not finite"] = found["num_tensors"]
        if (logits := found["logits"]) is not None:
            checks[f"largest difference of a logit in {found['loaded_by']} from our simulation"] = (
                f"{logits['max_diff']:.1e}"
            )
    if (found := report.checks.get("perplexity")) is not None:
        checks["perplexity"] = f"{found['after']:.3f}, {found['before']:.3f} before, on {found['tokens']} tokens"
    card = ModelCard(
        title=title,
        kind="quantized",
        command=shlex.join(command),
        sources=[plan.source],
        summary=f"Weights and activations of the linear layers and experts are quantized to {options.scheme}.",
        config=plan.target.config,
        to=f"{plan.target.to}, {plan.container.name}",
        options={
            "scheme": options.scheme,
            "group size": plan.target.scheme.weights.group_size or "a row",
            "scaling": options.scaling or "none",
            "rounding": options.rounding,
            "balance": options.balance,
            "affinity": options.affinity,
            "rotated": options.rotate,
            "calibration": f"{report.calibration_tokens} tokens, and {report.reserve_tokens} in reserve",
            "seed": options.seed,
        },
        checks=checks,
        notes=[*plan.rewritten, _NOTES.get(plan.container.name, "")],
    )
    return {CARD: render_card(card)}
