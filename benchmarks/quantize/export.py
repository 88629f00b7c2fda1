"""Whether servers compute what we simulate: quantised folders in stock transformers, GGUF files in llama.cpp.

transformers dequantises all weights, so our model leaves activations as they are for the comparison, and both have weights in the
checkpoint's dtype; llama.cpp rounds activations to 8 bits in its own way, and so does our model there. Folders are also scanned:
every tensor is there and finite.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.quantize.cells import method_options
from benchmarks.quantize.models import CARVED, UPCYCLED
from benchmarks.spec import Options, Row
from moe.models.compare import LogitComparison
from moe.models.folder import ModelFolder
from moe.models.gguf.verify import compare_with_llama_cpp
from moe.quant.containers.gguf import BLOCK
from moe.quant.options import QuantOptions
from moe.quant.plan import Plan, make_plan
from moe.quant.run import CalibrationText, Callbacks, quantize
from moe.quant.schemes import COMPRESSED_TENSORS, GGUF
from moe.quant.verify import verify_folder
from moe.quant.verify_gguf import load_as_llama_cpp

TO = {CARVED: "glm4_moe", UPCYCLED: "mixtral"}
METHOD = "eaquant+gptq"
SCHEMES_OUT = {
    COMPRESSED_TENSORS: ("w8a16", "w4a16", "w3a16", "w8a8", "w4a8", "fp8", "mxfp4"),
    GGUF: ("w8a16", "w4a16"),
}
QUICK_SCHEMES = {COMPRESSED_TENSORS: ("w4a16",), GGUF: ("w4a16",)}


@dataclass(frozen=True, kw_only=True)
class Export:
    """One file or folder, and what a server makes of it.

    Attributes:
        server: who computed its logits.
        found: they, compared with ours.
        num_bytes: of the weights' files.
    """

    server: str
    found: LogitComparison
    num_bytes: int


def to_transformers(plan: Plan, text: CalibrationText, windows_BL: Tensor, out: Path) -> Export:
    """A folder of compressed-tensors."""
    quantize(plan, out, text)
    verified = verify_folder(out, windows_BL)
    assert verified.loaded_by is not None and verified.logits is not None
    return Export(server=verified.loaded_by, found=verified.logits, num_bytes=ModelFolder(out).num_bytes)


def to_llama_cpp(plan: Plan, text: CalibrationText, windows_BL: Tensor, out: Path) -> Export:
    """A GGUF file; our model is made of the folder that it is written from."""
    ours: list[Any] = []

    def keep(folder: Path) -> dict[str, Any]:
        ours.append(load_as_llama_cpp(folder))
        return {}

    file = out.with_suffix(".gguf")
    quantize(plan, file, text, callbacks=Callbacks(check=keep))
    found = compare_with_llama_cpp(ours[0], file, windows_BL)
    return Export(server="llama.cpp", found=found, num_bytes=file.stat().st_size)


EXPORTERS: dict[str, Callable[[Plan, CalibrationText, Tensor, Path], Export]] = {
    COMPRESSED_TENSORS: to_transformers,
    GGUF: to_llama_cpp,
}


def rows(
    folders: dict[str, Path], calibration_BL: Tensor, reserve_BL: Tensor, windows_BL: Tensor, options: Options
) -> list[Row]:
    """One row per model, container and scheme; what is written is removed again."""
    found: list[Row] = []
    text = CalibrationText(windows_BL=calibration_BL, reserve_BL=reserve_BL)
    for model, folder in folders.items():
        for container, schemes in (QUICK_SCHEMES if options.quick else SCHEMES_OUT).items():
            for scheme in schemes:
                plan = make_plan(ModelFolder(folder), told(scheme, container), to=TO[model], container=container)
                out = folder.with_name(f"{model}-{container}-{scheme}")
                try:
                    made = EXPORTERS[container](plan, text, windows_BL, out)
                    found.append(row_of(plan, model, made))
                finally:
                    shutil.rmtree(out, ignore_errors=True)
                    out.with_suffix(".gguf").unlink(missing_ok=True)
                options.report(f"{model}, {scheme} in {made.server}: {found[-1]}")
    return found


def told(scheme: str, container: str) -> QuantOptions:
    """By the best method; in blocks of 32 for llama.cpp."""
    options = method_options(scheme, METHOD, 0)
    return replace(options, group_size=BLOCK) if container == GGUF else options


def row_of(plan: Plan, model: str, made: Export) -> Row:
    """A row of the table."""
    return {
        "part": "export",
        "model": model,
        "scheme": plan.target.scheme.name,
        "group": plan.target.scheme.weights.group_size or "row",
        "method": METHOD,
        "container": plan.container.name,
        "server": made.server,
        "max_diff": float(f"{made.found.max_diff:.2e}"),
        "logit_rms": round(made.found.reference_rms, 2),
        "kl": round(made.found.kl, 6),
        "same_top1": round(made.found.same_top1, 4),
        "mb": round(made.num_bytes / 1e6, 1),
    }
