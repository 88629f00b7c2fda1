"""Whether a written model folder computes what its source does: loaded afresh, run on text, logits compared.

A list of missing keys is not enough: loaders drop, rename and misread tensors without a word. A folder of a stock architecture
therefore runs in a process of its own in which nothing of us is imported (`stock_process`). Both models get the weights as
they were written and compute in fp32, so a difference is one of the conversion and not of the arithmetic.

Legend: B windows, L window length.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from moe.models import stock_process
from moe.models.compare import LogitComparison, LogitsFile, compare_logits, load_folder, model_logits
from moe.models.config import MoEConfig
from moe.models.evaluate import cut_windows
from moe.models.folder import ModelFolder

WINDOW, MAX_WINDOWS = 128, 4
# Largest difference of a token's logits relative to the RMS of the logits. In fp32 the order of additions makes some 1e-6;
# weights that were rewritten in half precision were rounded once more.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Share of tokens that may be beyond it: where two experts score the same, rounding decides who runs.
MAX_SHARE_FAR = 0.03
TEXT = """\
The harbour was quiet before sunrise. A single lamp swung above the fish market, and the keeper of the weather station wrote
down what she had written every morning for eleven years: pressure 1016, wind north-west, four knots, visibility good. By
seven o'clock the first ferry had left with thirty-two passengers, two bicycles and a dog. In the village people said that
nothing ever happened here, which was true only of the things that newspapers print.

def running_mean(values, width):
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        means.append(total / min(index + 1, width))
    return means

Water boils at 100 degrees Celsius at sea level, but at about 93 degrees in a town 2,000 metres up, because the air there
presses less on its surface. Q: Why does it take longer to cook beans in the mountains? A: They cook at a lower temperature.
Am Abend wurde es kühl, und die Kinder liefen nach Hause. Le lendemain, il faisait beau. 1, 1, 2, 3, 5, 8, 13, 21, 34, 55.
"""


def text_windows(folder: Path, text: str = TEXT, window: int = WINDOW, max_windows: int | None = MAX_WINDOWS) -> Tensor:
    """(B, L) int64 token ids of a text; its bytes where the folder has no tokenizer.

    Raises:
        ValueError: the text is shorter than one window.
    """
    source = ModelFolder(folder)
    config = source.config.get_text_config()
    if any(file.name.startswith("tokenizer") for file in source.sidecars()):
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text, add_special_tokens=False)[
            "input_ids"
        ]
    else:
        ids = [byte % config.vocab_size for byte in text.encode()]
    return cut_windows(ids, min(window, config.max_position_embeddings), max_windows)


def measure(
    reference: Path, other: Path, windows_BL: Tensor, dtype: torch.dtype = torch.float32, far: float = 1e-3
) -> LogitComparison:
    """Compare two folders, one in memory at a time.

    Args:
        reference: the source.
        other: what was made of it.
        windows_BL: from `text_windows`.
        dtype: the weights of both are rounded to it, as those of ``other`` were when they were written.
        far: as in `compare_logits`; see `tolerance`.

    Raises:
        ValueError: a folder does not load whole; names the tensors.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for index, folder in enumerate((reference, other)):
            files.append(LogitsFile(Path(scratch) / f"{index}.logits", len(windows_BL)))
            if isinstance(ModelFolder(folder).config, MoEConfig):
                files[-1].write(model_logits(load_folder(folder, dtype).float(), windows_BL))
            else:
                run_apart(folder, windows_BL, dtype, files[-1].path)
        length = windows_BL.shape[1]
        return compare_logits(files[0].windows(length), files[1].windows(length), windows_BL, far)


def tolerance(folder: Path, is_rewritten: bool) -> float:
    """How far off a token may be, for a written folder whose weights were ``is_rewritten`` or only copied.

    Raises:
        ValueError: weights of its dtype are not compared.
    """
    dtype = ModelFolder(folder).config.dtype
    if dtype not in TOLERANCES:
        raise ValueError(f"weights in {dtype} are not compared; pass --no-verify, or write them as fp32, fp16 or bf16")
    return TOLERANCES[dtype if is_rewritten else torch.float32]


def run_apart(folder: Path, windows_BL: Tensor, dtype: torch.dtype, out: Path) -> None:
    """Write the logits of a folder of transformers' own to a `LogitsFile`, computed in fp32 in a fresh process.

    Args:
        folder: plain or quantised; quantised weights are dequantised when they are loaded.
        windows_BL: token ids.
        dtype: in which weights are loaded.
        out: the file.

    Raises:
        ValueError: it does not run, or does not load whole; says why.
    """
    windows_file = out.with_suffix(".windows")
    save_file({"windows": windows_BL.contiguous()}, windows_file)
    arguments = [str(folder.absolute()), str(windows_file), str(dtype).removeprefix("torch."), str(out)]
    # -P: the script's own folder, with our modules in it, stays out of sys.path.
    command = [sys.executable, "-P", stock_process.__file__, *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"transformers cannot run {folder}: {done.stderr.strip()[-2000:]}")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    if report["problems"]:
        raise ValueError(f"{report['architecture']} does not load {folder} whole: {report['problems']}")


def check(found: LogitComparison, far: float) -> None:
    """Raise a ValueError where a comparison by `measure` says that the models differ."""
    if found.share_far > MAX_SHARE_FAR or math.isnan(found.max_diff) or math.isnan(found.kl):
        raise ValueError(
            f"the written model does not compute what its source does: {found.share_far:.1%} of {found.tokens} tokens differ "
            f"by more than {far:g} of the logits' RMS; {summary(found)}"
        )


def summary(found: LogitComparison) -> str:
    """One line for people."""
    return (
        f"largest logit difference {found.max_diff:.2e} (RMS {found.reference_rms:.2f}), KL {found.kl:.1e} nats, same "
        f"most likely token {found.same_top1:.2%} of {found.tokens}"
    )
