"""ToMoE as a conversion: a dense folder and text in, an MoE folder out.

The result is a plain top-1 MoE: a linear router without noise and weight 1 for the chosen expert. Mixtral, Qwen3-MoE and
GLM4-MoE express it, with shared experts GLM4-MoE alone.

Attention is left dense. The paper prunes it too (per-token dimensions of values, per-layer dimensions of queries and keys),
which no architecture that servers load can express.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.convert.dense import activation, check_dense, ffn_tensors, read_ffn
from moe.convert.model_card import CARD, ModelCard, render_card
from moe.convert.tomoe.experts import ExpertPlan, expert_width, plan_experts
from moe.convert.tomoe.options import ToMoEOptions
from moe.convert.tomoe.training import Progress, train_masks
from moe.models.compare import load_folder
from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.stock.write import Conversion, check_fits, write_model

_FAR = 0.1  # between the trained and the final width, relative


@dataclass(frozen=True, kw_only=True)
class ToMoEReport:
    """What came out.

    Attributes:
        width: neurons of an expert.
        num_shared: shared experts of that width.
        active_share, stored_share, covered_share: see `ExpertPlan`.
        trained_share: what training had come to before the widths were made equal; far from ``active_share``, there were too
            few steps.
        first, last: parts of the loss, means over the first and the last tenth of the steps.
    """

    width: int
    num_shared: int
    active_share: float
    stored_share: float
    covered_share: float
    trained_share: float
    first: dict[str, float]
    last: dict[str, float]


def tomoe_config(text_config: Any, plan: ExpertPlan) -> MoEConfig:
    """The config of the MoE that a plan makes of a dense decoder."""
    return MoEConfig(
        text_config=text_config,
        moe={
            "num_experts": plan.routed_LEW.shape[1],
            "expert_hidden": plan.width,
            "num_shared_experts": plan.num_shared,
            "activation": activation(text_config),
            "router": {"name": "topk", "top_k": 1, "renormalize": True, "frozen": True},
            "balance": {"aux_coef": 0.0},
        },
    )


def tomoe_convert(
    source: Path | ModelFolder,
    out: Path,
    windows_BL: Tensor,
    options: ToMoEOptions,
    *,
    to: str = "moe",
    device: str = "cpu",
    shared: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> ToMoEReport:
    """Train masks on text and write the MoE that they make.

    Args:
        source: a dense folder.
        out: the folder to make.
        windows_BL: (B, L) int64 token ids to train on.
        options: how to train.
        to: a key of `FORMATS`.
        device: to train on; the whole model has to fit.
        shared: see `plan_experts`.
        progress: called with steps done, in all, and the parts of the loss.
        command: for the model card, which is written where one is given.

    Raises:
        ValueError: ``out`` exists, the source is no dense decoder known here, the experts would be as wide as its FFN, or the
            result would not fit ``to``; all of it before training. Or the loss is not finite.
    """
    folder = source if isinstance(source, ModelFolder) else ModelFolder(source)
    if Path(out).exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    check_dense(folder, range(folder.config.num_hidden_layers))
    _check_result(folder.config, options, to, shared)
    model: Any = load_folder(folder.path, "auto" if options.bf16 else torch.float32, device)
    history: list[dict[str, float]] = []

    def note(step: int, steps: int, parts: dict[str, float]) -> None:
        history.append(parts)
        if progress is not None:
            progress(step, steps, parts)

    trained = train_masks(model, windows_BL, options, note)
    del model
    plan = plan_experts(trained, options.active_share, options.width_multiple, shared)
    tenth = max(len(history) // 10, 1)
    report = ToMoEReport(
        width=plan.width,
        num_shared=plan.num_shared,
        active_share=plan.active_share,
        stored_share=plan.stored_share,
        covered_share=plan.covered_share,
        trained_share=trained.active_share,
        first=_means(history[:tenth]),
        last=_means(history[-tenth:]),
    )
    texts = {} if command is None else {CARD: _card(Path(out).name, folder, plan, options, report, to, command)}
    write_experts(folder, plan, Path(out), to, texts)
    return report


def write_experts(
    source: ModelFolder, plan: ExpertPlan, out: Path, to: str = "moe", texts: dict[str, str] | None = None
) -> Path:
    """Write the MoE that a plan makes of a dense folder; arguments as those of `tomoe_convert`, texts by file name."""
    conversion = Conversion(
        source=source,
        config=tomoe_config(source.config, plan),
        layer_weights=lambda layer: plan.layer(layer, read_ffn(source, layer)),
        replaced=lambda layer, name: name in ffn_tensors(source.config, layer),
        texts=texts or {},
    )
    return write_model(conversion, out, to)


def _card(
    title: str,
    source: ModelFolder,
    plan: ExpertPlan,
    options: ToMoEOptions,
    report: ToMoEReport,
    to: str,
    command: str,
) -> str:
    return render_card(
        ModelCard(
            title=title,
            kind="carved",
            command=command,
            sources=[source],
            summary="Trained masks cut the dense FFNs into overlapping experts, one of which runs per token "
            "(ToMoE, arXiv 2501.15316). Attention is as it was.",
            config=tomoe_config(source.config, plan),
            to=to,
            options=asdict(options),
            checks={
                "FFN neurons that run per token": f"{report.active_share:.1%}",
                "FFN neurons that are stored, copies counted": f"{report.stored_share:.1%}",
                "FFN neurons that are in some expert": f"{report.covered_share:.1%}",
                "mean KL divergence per token on the training text, nats": f"{report.last['kd']:.4f}",
            },
            notes=["Fewer parameters run per token than in the source; the model's function is not kept."],
        )
    )


def _check_result(text_config: Any, options: ToMoEOptions, to: str, shared: bool) -> None:
    """Refuse what cannot be written before hours of training and not after.

    How many shared experts there will be is not known yet: a format that takes one takes any number.
    """
    width = expert_width(options.active_share, text_config.intermediate_size, options.width_multiple)
    blank_LEW = torch.zeros(text_config.num_hidden_layers, options.num_experts, width, dtype=torch.int64)
    plan = ExpertPlan(
        routed_LEW=blank_LEW,
        shared_LS=blank_LEW[:, 0, : width if shared else 0],
        router_LED=torch.zeros(0),
        num_neurons=text_config.intermediate_size,
    )
    check_fits(tomoe_config(text_config, plan), to)


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def report_lines(report: ToMoEReport) -> list[str]:
    """For people."""
    return [
        f"experts of {report.width} neurons" + (f", {report.num_shared} shared" if report.num_shared else ""),
        f"active {report.active_share:.1%} of the FFN, stored {report.stored_share:.1%}, covered {report.covered_share:.1%}",
        f"masks were trained to {report.trained_share:.1%}"
        + (": too few steps" if abs(report.trained_share / report.active_share - 1) > _FAR else ""),
        f"distance to the dense model (KL) {report.first['kd']:.4f} -> {report.last['kd']:.4f} on the training text",
    ]
