"""``quantized-decode``: speed and memory of packed weights of 8 and 4 bits, beside the same model in bf16.

- ``bank``: the routed experts of one layer, at the widths of a small and of two large models, for 1, 4, 16 and 512 tokens.
- ``model``: SmolLM2-135M upcycled to 8 experts of its own width, 2 per token: tokens per second of reading 512 tokens (prefill)
  and of 32 steps of greedy decoding (decode), at batch 1 and 4; the bytes of its weights; and the peak of memory of a process that
  loads it and decodes, above the same process without a model. What the weights are does not matter, so nothing is trained.

``w8a16`` has a scale per row, ``w4a16`` one per 64 columns. Variants take turns in one process. On a GPU the quantised products are
Triton kernels; without one there are no such rows.

Legend: B sequences, L window length, T tokens, D model, F expert FFN, E experts, K top-k.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from benchmarks.quantized_decode_worker import decode, load
from benchmarks.record import ROOT
from benchmarks.spec import Benchmark, Check, Options, Row
from benchmarks.timing import TIMING_COLUMNS, Timing, in_turns
from benchmarks.verify import compare
from moe.convert.demo import write_demo
from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.run import upcycle
from moe.experts import ExpertBank
from moe.kernels import quantized
from moe.models.folder import ModelFolder
from moe.quant.load import load_simulated
from moe.quant.options import QuantOptions
from moe.quant.plan import make_plan
from moe.quant.run import CalibrationText, quantize
from moe.quant.runtime import load_quantized
from moe.quantized_experts import QuantizedExpertBank
from moe.routers.assemble import routing_of_choices
from moe.types import Routing

PLAIN = "bf16"
GROUPS: dict[str, int | None] = {"w8a16": None, "w4a16": 64}
VARIANTS = (PLAIN, *GROUPS)
PARTS = ("bank", "model")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Routed experts of one layer."""

    dim: int
    hidden: int
    num_experts: int
    top_k: int

    @property
    def name(self) -> str:
        return f"D={self.dim} F={self.hidden} E={self.num_experts} K={self.top_k}"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    prompt: int
    steps: int
    batches: tuple[int, ...]


FULL = Size(
    shapes=(
        Shape(dim=576, hidden=192, num_experts=8, top_k=2),
        Shape(dim=2048, hidden=768, num_experts=32, top_k=8),
        Shape(dim=4096, hidden=1536, num_experts=8, top_k=2),
    ),
    tokens=(1, 4, 16, 512),
    prompt=512,
    steps=32,
    batches=(1, 4),
)
QUICK = Size(shapes=(Shape(dim=64, hidden=64, num_experts=4, top_k=2),), tokens=(1, 5), prompt=8, steps=2, batches=(1,))


def devices() -> list[str]:
    """Where there is something to measure."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def make_banks(shape: Shape, device: str) -> dict[str, nn.Module]:
    """The same experts in every variant."""
    torch.manual_seed(0)
    plain = ExpertBank(shape.num_experts, shape.dim, shape.hidden, "swiglu")
    plain.reset_parameters(shape.dim**-0.5)
    plain.to(torch.bfloat16)
    banks: dict[str, nn.Module] = {PLAIN: plain}
    for scheme, group_size in GROUPS.items():
        banks[scheme] = QuantizedExpertBank.from_bank(plain, scheme, group_size)
    return {name: bank.to(device) for name, bank in banks.items()}


def make_input(shape: Shape, num_tokens: int, device: str) -> tuple[Tensor, Routing]:
    """Tokens, each with K different experts."""
    random = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, shape.dim, generator=random).bfloat16()
    ids_TK = torch.rand(num_tokens, shape.num_experts, generator=random).topk(shape.top_k).indices
    weights_TK = torch.rand(num_tokens, shape.top_k, generator=random)
    return x_TD.to(device), routing_of_choices(ids_TK.to(device), weights_TK.to(device), shape.num_experts)


def make_models(out: Path, quick: bool, report: Callable[[str], None]) -> dict[str, Path]:
    """Folders of the model by variant."""
    dense = out / "dense"
    if quick:
        torch.manual_seed(0)
        tiny: Any = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=96,
                initializer_range=0.1,
            )
        )
        tiny.bfloat16().save_pretrained(dense)
    else:
        write_demo(dense, "bf16")
    folders = {PLAIN: out / PLAIN}
    upcycle([dense], folders[PLAIN], UpcycleOptions(num_experts=8), verify=False)
    text = CalibrationText(windows_BL=torch.arange(2, 34)[None])  # plain rounding reads none
    for scheme, group_size in GROUPS.items():
        report(f"{scheme}: rounding")
        folders[scheme] = out / scheme
        told = QuantOptions(scheme=scheme, group_size=group_size or 0)
        quantize(make_plan(ModelFolder(folders[PLAIN]), told), folders[scheme], text)
    return folders


def bank_rows(size: Size, options: Options) -> Iterator[Row]:
    """Part ``bank``."""
    for device in devices():
        for shape in size.shapes:
            banks = make_banks(shape, device)
            for num_tokens in size.tokens:
                options.report(f"{device}, {shape.name}, {num_tokens} tokens")
                x_TD, routing = make_input(shape, num_tokens, device)
                calls = 2 if options.quick else max(512 // num_tokens, 1)  # long enough for the clock
                functions = {name: partial(_run_bank, bank, x_TD, routing, calls) for name, bank in banks.items()}
                times = timed(functions, device, options)
                sizes = {name: _bank_bytes(bank) / 1e6 for name, bank in banks.items()}
                case = f"{shape.name} T={num_tokens}"
                yield from rows_of("bank", device, case, times, calls * num_tokens, {"weights_mb": sizes})


def model_rows(size: Size, options: Options) -> Iterator[Row]:
    """Part ``model``."""
    with tempfile.TemporaryDirectory() as name:
        folders = make_models(Path(name), options.quick, options.report)
        for device in devices():
            memory = {variant: measure_memory(folder, device) for variant, folder in folders.items()}
            models = {variant: load(folder, device) for variant, folder in folders.items()}
            for batch in size.batches:
                options.report(f"{device}, batch {batch}")
                ids_BL = torch.arange(batch * size.prompt).view(batch, -1).remainder(90).add(2).to(device)
                phases: dict[str, tuple[Callable[..., object], int]] = {
                    "prefill": (partial(_read, ids_BL), ids_BL.numel()),
                    "decode": (partial(_write, ids_BL[:, :1], size.steps), batch * size.steps),
                }
                for phase, (run, num_tokens) in phases.items():
                    times = timed({name: partial(run, model) for name, model in models.items()}, device, options)
                    case = f"SmolLM2-135M, 8 experts, batch {batch}, {phase}"
                    yield from rows_of("model", device, case, times, num_tokens, memory_columns(memory))


def _run_bank(bank: nn.Module, x_TD: Tensor, routing: Routing, calls: int) -> None:
    for _ in range(calls):
        bank(x_TD, routing)


def _read(ids_BL: Tensor, model: Any) -> None:
    model(ids_BL, logits_to_keep=1)


def _write(ids_BL: Tensor, steps: int, model: Any) -> None:
    decode(model, ids_BL, steps)


def measure_memory(folder: Path, device: str) -> dict[str, float]:
    """``weights_mb`` and ``peak_mb`` of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.quantized_decode_worker", str(folder), device]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_columns(memory: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By column, then by variant."""
    columns = next(iter(memory.values()))
    return {column: {variant: found[column] for variant, found in memory.items()} for column in columns}


def timed(functions: Mapping[str, Callable[[], object]], device: str, options: Options) -> dict[str, Timing]:
    """In turns, without gradients."""
    with torch.inference_mode():
        return in_turns(
            functions,
            options.repeats,
            options.wait_s,
            synchronize=torch.cuda.synchronize if device == "cuda" else lambda: None,
        )


def rows_of(
    part: str,
    device: str,
    case: str,
    times: dict[str, Timing],
    num_tokens: int,
    columns: dict[str, dict[str, float]],
) -> Iterator[Row]:
    """A row per variant."""
    base = times[PLAIN].quantile_ms(0.5)
    for variant, timing in times.items():
        median = timing.quantile_ms(0.5)
        yield {
            "part": part,
            "runs_on": device,
            "case": case,
            "variant": variant,
            **timing.columns(),
            "tokens_per_s": round(num_tokens / median * 1e3, 1),
            "speedup": round(base / median, 2),
            **{column: round(values[variant], 1) for column, values in columns.items()},
        }


def _bank_bytes(bank: nn.Module) -> int:
    if isinstance(bank, QuantizedExpertBank):
        return bank.num_bytes
    return sum(parameter.numel() * parameter.itemsize for parameter in bank.parameters())


def gate(options: Options) -> list[Check]:
    """Banks against dequantised weights, expert by expert; a packed model against the simulated one."""
    hf_logging.disable_progress_bar()
    size, checks = QUICK if options.quick else FULL, []
    for shape in size.shapes:
        for device in devices():
            banks = make_banks(shape, device)
            for scheme in GROUPS:
                bank = banks[scheme]
                assert isinstance(bank, QuantizedExpertBank)
                up, down = bank.weight("gate_up_proj"), bank.weight("down_proj")
                for num_tokens in size.tokens:
                    x_TD, routing = make_input(shape, num_tokens, device)
                    with torch.inference_mode():
                        got = bank(x_TD, routing)
                        expected = quantized.expert_ffn_quantized(x_TD, routing, up, down, "swiglu")
                    name = f"{device}, {scheme}, {shape.name}, {num_tokens} tokens"
                    checks += compare(name, {"y": got}, {"y": expected}, torch.bfloat16)
    with tempfile.TemporaryDirectory() as name:
        for variant, folder in make_models(Path(name), True, lambda line: None).items():
            if variant != PLAIN:
                ids_BL = torch.arange(2, 26).view(2, -1)
                with torch.inference_mode():
                    got, expected = (
                        model(ids_BL).logits
                        for model in (load_quantized(folder, dtype=torch.float32), load_simulated(folder))
                    )
                checks += compare(f"{variant}, model", {"logits": got}, {"logits": expected}, torch.float32)
    return checks


def run(options: Options) -> list[Row]:
    """Measure; see the module."""
    hf_logging.disable_progress_bar()
    size, parts = QUICK if options.quick else FULL, {"bank": bank_rows, "model": model_rows}
    return [row for part, rows in parts.items() if options.part in (None, part) for row in rows(size, options)]


BENCHMARK = Benchmark(
    name="quantized-decode",
    description="speed and memory of packed weights of 8 and 4 bits beside bf16: experts of a layer, and a whole model",
    columns=(
        "part",
        "runs_on",
        "case",
        "variant",
        *TIMING_COLUMNS,
        "tokens_per_s",
        "speedup",
        "weights_mb",
        "peak_mb",
    ),
    table=("runs_on", "case", "variant", "median_ms", "tokens_per_s", "speedup", "weights_mb", "peak_mb"),
    gate=gate,
    run=run,
    parts=PARTS,
)
