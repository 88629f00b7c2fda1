"""Quantises a model's folder, layer by layer.

Memory is that of one layer, of the text's residual stream and of what one layer's matrices see. What is finished is kept in
``OUT.quantizing/`` (`moe.quant.work`), so a killed run goes on where it was, and makes the same bits. The result appears under its
name when it is written and checked.

Legend: B windows, L window length, D model, E experts.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe import __version__
from moe.models.folder import FolderWriter, ModelFolder
from moe.models.stock import FORMATS
from moe.models.stock.decoder import decoder_config
from moe.models.stock.reformat import reformat
from moe.models.stock.write import write_model
from moe.quant.balance import expert_tokens
from moe.quant.inputs import LayerInputs
from moe.quant.plan import Plan
from moe.quant.report import REPORT_FILE, LayerReport, QuantReport
from moe.quant.simulate import quantize_activations
from moe.quant.step import quantize_layer, weights_of
from moe.quant.walk import QuantWalk, Seen, joined
from moe.quant.work import Stream, WorkFolder, fingerprint, text_hash

# Windows on which the quantised layers are compared with the source's.
REFERENCE_WINDOWS = 4
_LEAST_NORM = 1e-6  # of a residual stream that is zero


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """Token ids.

    Attributes:
        windows_BL: what everything is calibrated on.
        reserve_BL: more of the same text, for experts that get few tokens; ``None`` without balancing.
    """

    windows_BL: Tensor
    reserve_BL: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What a caller hears and adds.

    Attributes:
        layer: called with each finished layer, also with those of an earlier run.
        matrix: called with the layer and the name of each matrix that is rounded.
        check: called with the complete folder before it gets its name; gives figures for the report, or raises.
        check_file: the same, with that folder and what was made of it where the container is a file.
        describe: texts to put into the folder by file name, made from the report.
    """

    layer: Callable[[LayerReport], None] = lambda report: None
    matrix: Callable[[int, str], None] = lambda layer, name: None
    check: Callable[[Path], dict[str, Any]] = lambda folder: {}
    check_file: Callable[[Path, Path], dict[str, Any]] = lambda folder, file: {}
    describe: Callable[[QuantReport], dict[str, str]] = lambda report: {}


def quantize(
    plan: Plan,
    out: Path,
    text: CalibrationText,
    *,
    device: str = "cpu",
    restart: bool = False,
    callbacks: Callbacks | None = None,
) -> QuantReport:
    """Write ``out``.

    Args:
        plan: from `make_plan`.
        out: the folder to make; a file for GGUF.
        text: what to calibrate on.
        device: where layers compute.
        restart: do not go on with an earlier run, but begin again.
        callbacks: see there.

    Raises:
        ValueError: ``out`` exists, an earlier run had other settings, or the source is damaged.
    """
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another name")
    callbacks = callbacks or Callbacks()
    work = WorkFolder(out, _settings(plan, text, device), restart)
    source = _in_target_format(plan, work)
    try:
        _quantize_layers(plan, source, work, text, device, callbacks)
    except ValueError:  # a mistake that shows in the first layer leaves nothing behind
        if work.read_stream() is None:
            work.remove()
        raise
    folder = _assemble(plan, source, work)
    reports: list[QuantReport] = []

    def check(made: Path) -> None:
        reports.append(_report(plan, work, text, folder, made, callbacks))

    plan.container.finish(folder, out, check=check)
    work.remove()
    return reports[0]


def _settings(plan: Plan, text: CalibrationText, device: str) -> dict[str, Any]:
    """All that decides the result."""
    return {
        "moe": __version__,
        "torch": torch.__version__,
        "source": fingerprint(plan.source),
        "text": text_hash(text.windows_BL, text.reserve_BL),
        "to": plan.target.to,
        "container": plan.container.name,
        "device": torch.device(device).type,
        **asdict(plan.options),
    }


def _in_target_format(plan: Plan, work: WorkFolder) -> ModelFolder:
    """The model in the format that is going to be stored; a copy of it where its own is another."""
    if plan.target.to == plan.own:
        return plan.source
    folder = work.path / "source"
    if not folder.exists():
        write_model(reformat(plan.source), folder, plan.target.to)
    return ModelFolder(folder)


def _quantize_layers(
    plan: Plan, source: ModelFolder, work: WorkFolder, text: CalibrationText, device: str, callbacks: Callbacks
) -> None:
    """Make the files of all layers that are not there yet."""
    walk = QuantWalk(source, device=device)
    windows_BL = text.windows_BL if text.reserve_BL is None else torch.cat((text.windows_BL, text.reserve_BL))
    stream = work.read_stream()
    if stream is None:
        hidden_BLD = walk.embed(windows_BL)
        stream = Stream(next_layer=0, hidden_BLD=hidden_BLD, reference_BLD=hidden_BLD[:REFERENCE_WINDOWS])
    for layer in range(stream.next_layer):
        callbacks.layer(LayerReport.from_dict(work.read_report(layer)))
    while stream.next_layer < walk.num_layers:
        stream = _quantize_one(plan, walk, work, stream, windows_BL, len(text.windows_BL), callbacks)


def _quantize_one(
    plan: Plan,
    walk: QuantWalk,
    work: WorkFolder,
    stream: Stream,
    windows_BL: Tensor,
    num_calibration: int,
    callbacks: Callbacks,
) -> Stream:
    """Quantise the next layer, keep it, and move the text past it."""
    layer, options, scheme = stream.next_layer, plan.options, plan.target.scheme
    stored = walk.stored(layer)
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    module = walk.load(layer, stored)
    del stored
    num_reference = len(stream.reference_BLD)
    reference = walk.run(layer, stream.reference_BLD, windows_BL[:num_reference])
    inputs, tokens = _inputs(walk, layer, stream.hidden_BLD, windows_BL, num_calibration, options.balance)
    step = quantize_layer(
        module,
        inputs,
        options,
        scheme,
        dtypes,
        plan.target.dtype,
        plan.container.scale_dtype(plan.target.dtype),
        done=lambda name: callbacks.matrix(layer, name),
    )
    del inputs
    module = walk.load(layer, weights_of(step.layer))
    quantize_activations(module, scheme.activations)
    after = walk.run(layer, stream.hidden_BLD, windows_BL)
    walk.unload(layer)
    # Token by token, since the first ones have a norm that hides all others.
    norm_BL = reference.after_BLD.norm(dim=-1).clamp_min(_LEAST_NORM)
    wrong_BL = (after.after_BLD[:num_reference] - reference.after_BLD).norm(dim=-1) / norm_BL
    report = LayerReport(
        layer=layer,
        matrices=step.matrices,
        stream_error=float(wrong_BL.square().mean().sqrt()),
        router_agreement=_agreement(reference, after),
        tokens=tokens,
        notes=step.notes,
    )
    work.write_layer(layer, step.layer, asdict(report))
    following = Stream(next_layer=layer + 1, hidden_BLD=after.after_BLD, reference_BLD=reference.after_BLD)
    work.write_stream(following)
    callbacks.layer(report)
    return following


def _inputs(
    walk: QuantWalk, layer: int, hidden_BLD: Tensor, windows_BL: Tensor, num_calibration: int, ratio: float
) -> tuple[LayerInputs, dict[str, Any]]:
    """What the loaded layer's matrices see, and how many tokens each expert gets."""
    text = hidden_BLD[:num_calibration], windows_BL[:num_calibration]
    seen = walk.run(layer, *text, note_linear=True, note_ffn=True)
    if seen.ffn_TD is None:
        return LayerInputs(linear=seen.linear), {}
    assert seen.routed is not None
    ffn_TD, routed, counts_E = seen.ffn_TD, seen.routed, seen.routed.counts_E
    num_tokens = len(ffn_TD)
    if len(windows_BL) > num_calibration:
        more = walk.run(layer, hidden_BLD[num_calibration:], windows_BL[num_calibration:], note_ffn=True)
        assert more.ffn_TD is not None and more.routed is not None
        ffn_TD, routed = torch.cat((ffn_TD, more.ffn_TD)), joined((routed, more.routed))
    tokens = expert_tokens(ffn_TD, routed, num_tokens, ratio)
    inputs = LayerInputs(
        linear=seen.linear,
        ffn_TD=tokens.ffn_TD,
        tokens_e=tokens.tokens_e,
        weights_e=tokens.weights_e,
        counts_E=counts_E,
    )
    return inputs, {name: getattr(tokens, name) for name in ("target", "routed", "reserve", "scored")}


def _agreement(reference: Seen, after: Seen) -> float | None:
    """Of the experts that the source's router chose, share that the quantised model's chose for the same tokens."""
    if reference.routed is None or after.routed is None:
        return None
    expected_TE = reference.routed.chosen_TE()
    got_TE = after.routed.chosen_TE()[: len(expected_TE)]
    return float((expected_TE & got_TE).sum() / expected_TE.sum().clamp_min(1))


def _assemble(plan: Plan, source: ModelFolder, work: WorkFolder) -> Path:
    """Put the finished layers into a folder."""
    target, folder = plan.target, work.path / "model"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before it got its name
    with FolderWriter(folder) as writer:
        for name in source.names:
            if not name.startswith("model.layers."):
                writer.add(name, source.read(name))
        for layer in range(decoder_config(target.config).num_hidden_layers):
            rounded = work.read_layer(layer, target.scheme.weights)
            for name, tensor in plan.container.write_layer(target, rounded, f"model.layers.{layer}."):
                writer.add(name, tensor)
        config = FORMATS[target.to].to_stock(target.config)
        for part in (config, config.get_text_config()):
            part.dtype = target.dtype
        config.quantization_config = plan.container.quantization_config(target)
        return writer.finish(config, source.sidecars())


def _report(
    plan: Plan, work: WorkFolder, text: CalibrationText, folder: Path, made: Path, callbacks: Callbacks
) -> QuantReport:
    """Check what was made, and describe it; in the folder itself, where it is one."""
    is_folder = made == folder
    layers = range(decoder_config(plan.target.config).num_hidden_layers)
    report = QuantReport(
        layers=[LayerReport.from_dict(work.read_report(layer)) for layer in layers],
        bytes_before=plan.source.num_bytes,
        bytes_after=ModelFolder(folder).num_bytes if is_folder else made.stat().st_size,
        calibration_tokens=text.windows_BL.numel(),
        reserve_tokens=0 if text.reserve_BL is None else text.reserve_BL.numel(),
        checks=callbacks.check(folder) | ({} if is_folder else callbacks.check_file(folder, made)),
    )
    if is_folder:
        (folder / REPORT_FILE).write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
        for name, content in callbacks.describe(report).items():
            (folder / name).write_text(content, encoding="utf-8")
    return report
