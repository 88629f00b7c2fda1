"""The two MoE models that ``quantize`` measures, made of SmolLM2-135M: ``python -m benchmarks.quantize.models OUT``.

- ``carved``: 8 experts of width 192, 2 shared and 4 of 6 routed (method ``best``), recovered in full; GLM4-MoE can hold it.
- ``upcycled``: 4 experts of the dense width, 2 per token, a share of each expert's neurons drawn anew (``drop``), recovered in
  full, gates as well, under the balance loss; Mixtral can hold it.

Both are bf16 in our own format, as most checkpoints that are quantised are in bf16. The source's weights are 4-bit values (Q4_1,
groups of 32 columns); after the training they are no more, but for embeddings that few tokens moved.
One thread, fixed seeds: the same machine makes the same weights again. A folder that exists is left alone.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from benchmarks.carve.cells import IN_DOMAIN, TEXT
from moe.convert.carve.options import CarveOptions
from moe.convert.carve.run import carve
from moe.convert.carve.types import CarveShape
from moe.convert.demo import write_demo
from moe.convert.recover import Point, RecoverOptions, recover_folder
from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.run import upcycle
from moe.models.calibration_text import choose_windows, read_text, split_text, tokenize
from moe.models.evaluate import cut_windows, perplexity_of
from moe.models.folder import ModelFolder

CARVED, UPCYCLED = "carved", "upcycled"
QUICK_VOCAB = 96
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes.

    Attributes:
        window: tokens in a window.
        calibration: tokens that carving sees.
        eval_windows: held out, for the perplexities that are reported.
        carved, upcycled: how either is trained.
        drop_ratio: share of an upcycled expert's neurons that are drawn anew.
    """

    window: int
    calibration: int
    eval_windows: int
    carved: RecoverOptions
    upcycled: RecoverOptions
    drop_ratio: float = 0.125


FULL = Recipe(
    window=512,
    calibration=16384,
    eval_windows=8,
    carved=RecoverOptions(steps=40, mode="full", lr=1e-4, batch_size=2, micro_batch_size=1, router_lr=0.02, bf16=True),
    upcycled=RecoverOptions(
        steps=40, mode="full", lr=2e-4, batch_size=2, micro_batch_size=1, router_lr=0.05, bf16=True
    ),
)
QUICK = Recipe(
    window=32,
    calibration=256,
    eval_windows=2,
    carved=RecoverOptions(steps=2, mode="full", lr=1e-3, batch_size=1, router_lr=0.02),
    upcycled=RecoverOptions(steps=4, mode="full", lr=1e-2, batch_size=1, router_lr=0.05),
)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Token ids of the text, (B, L): to train on and held out; ``ids`` are those of the first in a row."""

    ids: list[int]
    train_BL: Tensor
    held_out_BL: Tensor


def quick_dense(folder: Path) -> Path:
    """A random Llama of two layers whose widths the smallest groups divide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=QUICK_VOCAB,
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,
        dtype=torch.bfloat16,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def read_windows(dense: Path, recipe: Recipe, quick: bool) -> Windows:
    """WikiText-2, or random tokens."""
    if quick:
        random = torch.Generator().manual_seed(0)
        train, held_out = (torch.randint(QUICK_VOCAB, (n,), generator=random).tolist() for n in (4096, 256))
    else:
        tokenizer = AutoTokenizer.from_pretrained(dense)
        train, held_out = (tokenize(tokenizer, part) for part in split_text(read_text(TEXT / IN_DOMAIN)))
    return Windows(
        ids=train,
        train_BL=cut_windows(train, recipe.window, None),
        held_out_BL=cut_windows(held_out, recipe.window, recipe.eval_windows),
    )


def make_carved(dense: Path, folder: Path, windows: Windows, recipe: Recipe) -> None:
    """Carve, without training."""
    shape = CarveShape(num_experts=8, num_shared=2, top_k=4)
    random = torch.Generator().manual_seed(0)
    windows_BL = choose_windows([windows.ids], recipe.calibration, recipe.window, random)
    carve(ModelFolder(dense), folder, windows_BL, CarveOptions(shape=shape, method="best", bf16=recipe.carved.bf16))


def make_upcycled(dense: Path, folder: Path, windows: Windows, recipe: Recipe) -> None:
    """Upcycle, without training."""
    options = UpcycleOptions(num_experts=4, top_k=2, method="drop", ratio=recipe.drop_ratio)
    upcycle([dense], folder, options, verify=False)


MAKERS = {CARVED: make_carved, UPCYCLED: make_upcycled}


def make_models(
    out: Path, quick: bool = False, names: tuple[str, ...] = tuple(MAKERS), report: Report = lambda line: None
) -> dict[str, Path]:
    """Make the models that are missing below ``out``; their folders by name."""
    recipe = QUICK if quick else FULL
    folders = {name: out / name for name in names}
    missing = [name for name in names if not folders[name].exists()]
    if not missing:
        return folders
    hf_logging.disable_progress_bar()
    with TemporaryDirectory() as scratch:
        dense = quick_dense(Path(scratch) / "dense") if quick else write_demo(Path(scratch) / "dense", "bf16")
        windows = read_windows(dense, recipe, quick)
        for name in missing:
            start = time.perf_counter()
            untrained = Path(scratch) / name
            MAKERS[name](dense, untrained, windows, recipe)
            report(f"{name}: made in {time.perf_counter() - start:.0f} s; training it")
            _train(name, untrained, folders[name], dense, windows, getattr(recipe, name), report)
            report(f"{name}: done after {time.perf_counter() - start:.0f} s: {folders[name]}")
    return folders


def _train(
    name: str, untrained: Path, out: Path, dense: Path, windows: Windows, options: RecoverOptions, report: Report
) -> None:
    def tell(point: Point) -> None:
        if point.held_out is not None:
            report(f"{name}: step {point.step}, held-out perplexity {perplexity_of(point.held_out):.3f}")
        elif point.step % 10 == 0:
            report(f"{name}: step {point.step}, loss {point.loss:.3f}, distance {point.distance:.3f}")

    recover_folder(untrained, out, windows.train_BL, windows.held_out_BL, options, distill=dense, report=tell)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantize.models", description=__doc__)
    parser.add_argument("out", type=Path, help="folder that gets a folder for each model")
    parser.add_argument("--only", choices=tuple(MAKERS), help="make this one alone")
    parser.add_argument("--quick", action="store_true", help="tiny random models, to see that it works")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in the same order on machines with more
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    make_models(
        args.out,
        args.quick,
        tuple(MAKERS) if args.only is None else (args.only,),
        lambda line: print(f"[{time.perf_counter() - start:6.1f} s] {line}", file=sys.stderr, flush=True),
    )


if __name__ == "__main__":
    main()
