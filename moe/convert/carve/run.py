"""Carves a dense model's folder into an MoE's, layer by layer.

Memory is that of the calibration text's activations and of one layer. The result appears under its name when it is written,
checked and described.

Legend: B windows, L window length, T = B * L, D model.
"""

import copy
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moe.convert.carve import CARVERS
from moe.convert.carve.build import build_layer, moe_spec
from moe.convert.carve.calibrate import CalibrationWalk
from moe.convert.carve.gates import carved_output
from moe.convert.carve.layer import carve_layer, gate_class
from moe.convert.carve.measure import LayerQuality, measure
from moe.convert.carve.neurons import output
from moe.convert.carve.options import CarveOptions
from moe.convert.carve.types import LinearGate
from moe.convert.dense import DenseFFN, activation, check_dense, ffn_tensors, read_ffn
from moe.errors import nearest
from moe.models.compare import LogitComparison, compare_folders
from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder
from moe.models.modeling import MoEForCausalLM
from moe.models.moe_weights import MoEWeights
from moe.models.stock.write import Conversion, check_fits, write_model

# Largest difference of a logit in fp32, times their root mean square where that is above 1, when every expert runs.
EXACT_LIMIT = 1e-4
VERIFY_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer, as it is done.

    Attributes:
        layer: its index.
        quality: on calibration tokens.
        seconds: that the method and the refit took.
    """

    layer: int
    quality: LayerQuality
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Carved:
    """What came out.

    Attributes:
        out: its folder.
        config: of the model, in our form.
        layers: one report each.
        comparison: with the source in fp32 on the first tokens of ``check_BL``; ``None`` where it was not asked for.
    """

    out: Path
    config: MoEConfig
    layers: list[LayerReport] = field(default_factory=list)
    comparison: LogitComparison | None = None


Describe = Callable[[Carved], dict[str, str]]


def carve(
    source: ModelFolder,
    out: Path,
    windows_BL: Tensor,
    options: CarveOptions,
    *,
    to: str = "moe",
    check_BL: Tensor | None = None,
    report: Callable[[LayerReport], None] = lambda layer: None,
    describe: Describe = lambda carved: {},
) -> Carved:
    """Write the folder ``out``.

    Args:
        source: a dense model.
        out: the folder to make.
        windows_BL: calibration text, token ids.
        options: the method and what it is told.
        to: a key of `FORMATS`.
        check_BL: text on which logits are compared with the source's; needs memory for either model in fp32.
        report: called with each layer.
        describe: texts to put into the folder, by file name.

    Raises:
        ValueError: ``out`` exists, or what is asked for is impossible for this source; names the option.
        RuntimeError: every expert runs for every token, and yet logits differ.
    """
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    config = carved_config(source, options)
    check_format(config, options, to)
    layers: list[LayerReport] = []
    walk = CalibrationWalk(source, windows_BL, torch.bfloat16 if options.bf16 else torch.float32)

    def layer_weights(layer: int) -> MoEWeights:
        stored = read_ffn(source, layer)
        ffn = in_fp32(stored)
        inputs = walk.enter(partial(output, ffn))
        start = time.perf_counter()
        carving = carve_layer(ffn, inputs, options, layer)
        seconds = time.perf_counter() - start
        quality = measure(ffn, inputs, carving, options.shape.top_k)
        walk.leave(partial(carved_output, ffn, carving, top_k=options.shape.top_k) if options.sequential else None)
        layers.append(LayerReport(layer=layer, quality=quality, seconds=seconds))
        report(layers[-1])
        return build_layer(ffn, carving, options.shape.top_k, inputs.x_TD, stored.up_FD.dtype)

    conversion = Conversion(
        source=source,
        config=config,
        layer_weights=layer_weights,
        replaced=lambda layer, name: name in ffn_tensors(source.config, layer),
    )
    unnamed = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        write_model(conversion, unnamed, to)
        comparison = None
        if check_BL is not None:
            comparison = compare_folders(source.path, unnamed, check_BL[:1, :VERIFY_TOKENS])
            _check_exact(options, comparison)
        carved = Carved(out=out, config=config, layers=layers, comparison=comparison)
        for name, text in describe(carved).items():
            (unnamed / name).write_text(text, encoding="utf-8")
        unnamed.rename(out)
    finally:
        shutil.rmtree(unnamed, ignore_errors=True)
    return carved


def carved_config(source: ModelFolder, options: CarveOptions) -> MoEConfig:
    """The result's config, checked against the source without reading weights, and by building the model without memory.

    Raises:
        ValueError: an unknown method, an impossible shape, or a source whose FFNs experts cannot replace.
    """
    if options.method not in CARVERS:
        trained = "; tomoe is trained, and has a command of its own: moe tomoe" if options.method == "tomoe" else ""
        raise ValueError(f"--method {options.method!r} is unknown; {nearest(options.method, CARVERS)}{trained}")
    check_dense(source, range(source.config.num_hidden_layers))
    per_expert = options.shape.check(source.config.intermediate_size)
    spec = moe_spec(options.shape, per_expert, activation(source.config), gate_class(options))
    text_config = copy.deepcopy(source.config)
    config = MoEConfig(text_config=text_config, moe=spec, dtype=text_config.dtype)
    with torch.device("meta"):
        MoEForCausalLM(config)
    return config


def check_format(config: MoEConfig, options: CarveOptions, to: str) -> None:
    """Raise a ValueError that says what the format ``to`` cannot express, and whether another gate would help."""
    if to != "moe" and gate_class(options) is not LinearGate:
        raise ValueError(f"--to {to} cannot hold the gate of --method {options.method}; add --gate ridge, a linear one")
    check_fits(config, to)


def in_fp32(ffn: DenseFFN) -> DenseFFN:
    """The FFN in fp32, in which everything is computed."""
    gate_FD = None if ffn.gate_FD is None else ffn.gate_FD.float()
    return DenseFFN(gate_FD=gate_FD, up_FD=ffn.up_FD.float(), down_DF=ffn.down_DF.float())


def _check_exact(options: CarveOptions, found: LogitComparison) -> None:
    """With all routed experts running, the carved model is the dense one with its neurons in another order."""
    runs_all = options.shape.top_k == options.shape.num_routed
    if runs_all and not found.max_diff <= EXACT_LIMIT * max(1.0, found.reference_rms):
        raise RuntimeError(
            f"every expert runs for every token, and logits differ by {found.max_diff:.2e}; this is a bug: please report it "
            "with the source's config.json"
        )
