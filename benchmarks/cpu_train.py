"""`cpu-train`: a training step on the CPU, ours against transformers on the same weights.

Two parts. ``block``: one MoE block, router included, forward and backward with all gradients, against transformers' block
under each of its CPU expert implementations and against a dense SwiGLU of the same FLOPs (hidden K * F). ``model``: a whole
small causal language model, tokens in, loss and all gradients out.

Tokens are drawn so that no choice of an expert is a near-tie: transformers computes router logits in the model's dtype,
we in fp32, and a choice that hangs on rounding would make outputs of two right implementations differ.

Legend: T tokens, D model, F expert FFN, E experts, K top-k, N assignments.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.spec import Benchmark, Check, Options, Row
from benchmarks.timing import TIMING_COLUMNS, Timing, in_turns
from benchmarks.verify import compare
from moe.experts import SharedExperts
from moe.layer import MoELayer, MoESpec
from moe.models import MoEConfig, MoEForCausalLM
from moe.routers.balance import BalanceConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OURS, OURS_AUX, DENSE = "moe", "moe + balance loss", "dense of the same FLOPs"
MEMORY_SHARE = 0.5  # of what is free; an implementation that would need more is skipped


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one MoE block."""

    num_tokens: int
    dim: int
    num_experts: int
    top_k: int
    hidden: int

    @property
    def name(self) -> str:
        return f"T={self.num_tokens} D={self.dim} E={self.num_experts} K={self.top_k} F={self.hidden}"

    @property
    def gflop(self) -> float:
        """Of forward and backward: three matmuls forward, six backward; the router is left out."""
        return 3 * 2 * 3 * self.num_tokens * self.top_k * self.dim * self.hidden / 1e9


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Sizes of the small language model."""

    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    hidden: int = 256
    vocab: int = 4096
    batch: int = 16
    length: int = 256

    @property
    def name(self) -> str:
        return (
            f"D={self.dim} layers={self.num_layers} E={self.num_experts} K={self.top_k} F={self.hidden} "
            f"V={self.vocab} batch={self.batch}x{self.length}"
        )


SHAPES = (
    Shape(num_tokens=8192, dim=512, num_experts=64, top_k=8, hidden=256),
    Shape(num_tokens=8192, dim=512, num_experts=8, top_k=2, hidden=1024),
)
QUICK_SHAPES = (Shape(num_tokens=64, dim=32, num_experts=4, top_k=2, hidden=16),)
MODEL = ModelSize()
QUICK_MODEL = ModelSize(dim=32, num_layers=2, num_heads=2, num_experts=4, hidden=16, vocab=64, batch=2, length=16)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One shape in one dtype: both blocks on the same weights, an input and the gradient that comes back."""

    shape: Shape
    dtype_name: str
    x_BLD: Tensor
    dy_BLD: Tensor
    theirs: nn.Module
    ours: MoELayer
    ours_aux: MoELayer
    dense: nn.Module

    @property
    def name(self) -> str:
        return f"{self.shape.name} {self.dtype_name}"


def _clear_tokens(shape: Shape, router_weight_ED: Tensor, generator: torch.Generator) -> Tensor:
    """(T, D) normal tokens: of twice as many, those whose K-th and K+1-th logits are furthest apart, in drawing order."""
    x_TD = torch.randn(2 * shape.num_tokens, shape.dim, generator=generator)
    best_Tk = (x_TD @ router_weight_ED.T).topk(shape.top_k + 1, dim=-1).values
    margin_T = best_Tk[:, -2] - best_Tk[:, -1]
    return x_TD[margin_T.topk(shape.num_tokens).indices.sort().values]


def make_block(shape: Shape, dtype_name: str) -> Block:
    """Fixed seed: the gate and the measurement see the same numbers."""
    dtype, generator = DTYPES[dtype_name], torch.Generator().manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=shape.dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.hidden,
        norm_topk_prob=True,
    )
    config._experts_implementation = "eager"
    theirs = Qwen3MoeSparseMoeBlock(config)
    dense = SharedExperts(shape.dim, shape.top_k * shape.hidden, "swiglu", gated=False)
    with torch.no_grad():
        for parameter in (*theirs.parameters(), *dense.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * shape.dim**-0.5)
        theirs.to(dtype)
        ours, ours_aux = (_our_layer(shape, balance).to(dtype) for balance in (BalanceConfig(aux_coef=0.0), None))
        for layer in (ours, ours_aux):
            layer.load_state_dict({_our_name(name): value for name, value in theirs.state_dict().items()})
        x_TD = _clear_tokens(shape, theirs.gate.weight.float(), generator)
        dy_TD = torch.randn(x_TD.shape, generator=generator)
    return Block(
        shape=shape,
        dtype_name=dtype_name,
        x_BLD=x_TD[None].to(dtype),
        dy_BLD=dy_TD[None].to(dtype),
        theirs=theirs,
        ours=ours,
        ours_aux=ours_aux,
        dense=dense.to(dtype),
    )


def _our_layer(shape: Shape, balance: BalanceConfig | None) -> MoELayer:
    spec = MoESpec(
        num_experts=shape.num_experts,
        expert_hidden=shape.hidden,
        router={"name": "topk", "top_k": shape.top_k, "renormalize": True},
        balance=balance or BalanceConfig(),
    )
    return MoELayer(shape.dim, spec)


def _our_name(name: str) -> str:
    """Our name of a parameter of transformers' block or model; only the router's differs."""
    return name.replace("gate.weight", "router.weight")


def _select(module: nn.Module, implementation: str) -> None:
    module.experts.config._experts_implementation = implementation  # type: ignore[union-attr]


def _step(module: nn.Module, block: Block) -> dict[str, Tensor]:
    """Forward and backward; the output, and the gradients by our parameter names."""
    module.zero_grad()
    x_BLD = block.x_BLD.detach().requires_grad_()
    y_BLD = module(x_BLD)
    y_BLD.backward(block.dy_BLD)
    assert x_BLD.grad is not None
    found = {"y": y_BLD.detach(), "dx": x_BLD.grad}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        found[f"d {_our_name(name)}"] = parameter.grad
    return found


def _free_bytes() -> int | None:
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    fields = dict(line.split(":") for line in path.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def skip_reason(shape: Shape, dtype_name: str, implementation: str) -> str | None:
    """Why transformers' implementation is not run at this shape, or ``None``."""
    free = _free_bytes()
    if implementation != "batched_mm" or free is None:
        return None
    # It gathers the weights of every assignment, and backward holds a gradient of the same size.
    needed = 2 * shape.num_tokens * shape.top_k * 3 * shape.dim * shape.hidden * DTYPES[dtype_name].itemsize
    if needed <= free * MEMORY_SHARE:
        return None
    return f"skipped: needs {needed / 2**30:.0f} GiB for one copy of the weights per assignment"


IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def _theirs_step(block: Block, implementation: str) -> Callable[[], dict[str, Tensor]]:
    def step() -> dict[str, Tensor]:
        _select(block.theirs, implementation)
        return _step(block.theirs, block)

    return step


def _blocks(options: Options) -> Iterator[Block]:
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        for dtype_name in DTYPES:
            options.report(f"block {shape.name} {dtype_name}")
            yield make_block(shape, dtype_name)


def _runnable(block: Block) -> list[str]:
    return [name for name in IMPLEMENTATIONS if skip_reason(block.shape, block.dtype_name, name) is None]


def _gate_block(block: Block) -> list[Check]:
    ours = {name: value.clone() for name, value in _step(block.ours, block).items()}
    checks = []
    for implementation in _runnable(block):
        expected = _theirs_step(block, implementation)()
        checks += compare(f"{block.name}, {implementation}", ours, expected, DTYPES[block.dtype_name])
    return checks


def _measure_block(block: Block, options: Options) -> list[Row]:
    functions: dict[str, Callable[[], object]] = {
        OURS: lambda: _step(block.ours, block),
        OURS_AUX: lambda: _step(block.ours_aux, block),
        DENSE: lambda: _step(block.dense, block),
    }
    for implementation in _runnable(block):
        functions[f"transformers {implementation}"] = _theirs_step(block, implementation)
    times = in_turns(functions, options.repeats, options.wait_s, options.report)
    rows = _rows("block", block.shape.name, block.dtype_name, block.shape.num_tokens, times)
    for row in rows:
        median_s = times[str(row["implementation"])].quantile_ms(0.5) / 1e3
        row["gflop_per_s"] = round(block.shape.gflop / median_s, 1)
        row["of_dense"] = round(times[DENSE].quantile_ms(0.5) / 1e3 / median_s, 2)
    skipped = {name: skip_reason(block.shape, block.dtype_name, name) for name in IMPLEMENTATIONS}
    rows += [
        {
            "part": "block",
            "case": block.shape.name,
            "dtype": block.dtype_name,
            "implementation": f"transformers {name}",
            "note": reason,
        }
        for name, reason in skipped.items()
        if reason is not None
    ]
    return rows


def _rows(part: str, case: str, dtype_name: str, num_tokens: int, times: dict[str, Timing]) -> list[Row]:
    """One row per implementation; a speed-up is over the fastest of transformers' implementations."""
    fastest = min(timing.quantile_ms(0.5) for name, timing in times.items() if name.startswith("transformers"))
    rows: list[Row] = []
    for name, timing in times.items():
        median_ms = timing.quantile_ms(0.5)
        rows.append(
            {
                "part": part,
                "case": case,
                "dtype": dtype_name,
                "implementation": name,
                "tokens_per_s": round(num_tokens / median_ms * 1e3),
                "speedup": round(fastest / median_ms, 2) if name in (OURS, OURS_AUX) else None,
                **timing.columns(),
            }
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Models:
    """The same small language model in both libraries, and one batch."""

    size: ModelSize
    dtype_name: str
    ids_BL: Tensor
    theirs: nn.Module
    ours: nn.Module

    @property
    def name(self) -> str:
        return f"{self.size.name} {self.dtype_name}"


def make_models(size: ModelSize, dtype_name: str) -> Models:
    """Weights drawn by transformers, loaded into ours by name."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "hidden_size": size.dim,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_heads // 2,
        "head_dim": size.dim // size.num_heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": size.length,
        "use_cache": False,
    }
    config = Qwen3MoeConfig(
        **common,
        num_experts=size.num_experts,
        num_experts_per_tok=size.top_k,
        moe_intermediate_size=size.hidden,
        norm_topk_prob=True,
        initializer_range=0.05,
    )
    theirs = Qwen3MoeForCausalLM(config)
    spec = {
        "num_experts": size.num_experts,
        "expert_hidden": size.hidden,
        "router": {"name": "topk", "top_k": size.top_k, "renormalize": True},
        "balance": {"aux_coef": 0.0},
    }
    ours = MoEForCausalLM(
        MoEConfig(text_config=Qwen3Config(**common, intermediate_size=size.top_k * size.hidden), moe=spec)
    )
    ours.load_state_dict({_our_name(name): value for name, value in theirs.state_dict().items()})
    ids_BL = _clear_batch(theirs, size)
    dtype = DTYPES[dtype_name]
    return Models(
        size=size,
        dtype_name=dtype_name,
        ids_BL=ids_BL,
        theirs=theirs.to(dtype).train(),
        ours=ours.to(dtype).train(),
    )


@torch.no_grad()
def _clear_batch(model: nn.Module, size: ModelSize) -> Tensor:
    """The first random batch in which no fp32 router of ``model`` has its K-th and K+1-th logits closer than 2e-5.

    The two libraries' activations differ by a few 1e-6, and one token with another expert moves all gradients by 1e-3.
    """
    margins: list[float] = []

    def note(module: nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        best_Tk = outputs[0].topk(size.top_k + 1, dim=-1).values
        margins.append(float((best_Tk[:, -2] - best_Tk[:, -1]).min()))

    hooks = [layer.mlp.gate.register_forward_hook(note) for layer in model.model.layers]  # type: ignore[union-attr]
    for seed in range(100):
        margins.clear()
        ids_BL = torch.randint(size.vocab, (size.batch, size.length), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids_BL)
        if min(margins) > 2e-5:
            break
    else:
        raise AssertionError(f"no batch without a near-tie for {size.name}")
    for hook in hooks:
        hook.remove()
    return ids_BL


def _model_step(model: nn.Module, models: Models, implementation: str | None = None) -> dict[str, Tensor]:
    if implementation is not None:
        model.config._experts_implementation = implementation  # type: ignore[union-attr]
    model.zero_grad()
    outputs = model(input_ids=models.ids_BL, labels=models.ids_BL)
    outputs.loss.backward()
    found = {"logits": outputs.logits.detach(), "loss": outputs.loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"d {_our_name(name)}"] = parameter.grad
    return found


def _models(options: Options) -> Iterator[Models]:
    for dtype_name in DTYPES:
        size = QUICK_MODEL if options.quick else MODEL
        options.report(f"model {size.name} {dtype_name}")
        yield make_models(size, dtype_name)


def _gate_models(models: Models) -> list[Check]:
    """fp32: logits, loss and every gradient. bf16: logits and loss only.

    A token's path through several bf16 layers does meet near-ties, so a few tokens take another expert there; the bound
    is wider for it, and gradients of single experts are left to the fp32 check and to that of the block.
    """
    ours = {name: value.clone() for name, value in _model_step(models.ours, models).items()}
    expected = _model_step(models.theirs, models, "grouped_mm")
    if models.dtype_name == "fp32":
        return compare(models.name, ours, expected, torch.float32)
    return [
        *compare(models.name, {"logits": ours["logits"]}, {"logits": expected["logits"]}, torch.bfloat16, factor=5),
        *compare(models.name, {"loss": ours["loss"]}, {"loss": expected["loss"]}, torch.bfloat16, factor=0.1),
    ]


def _measure_models(models: Models, options: Options) -> list[Row]:
    functions: dict[str, Callable[[], object]] = {OURS: lambda: _model_step(models.ours, models)}
    for name in ("eager", "grouped_mm"):
        functions[f"transformers {name}"] = lambda name=name: _model_step(models.theirs, models, name)
    times = in_turns(functions, options.repeats, options.wait_s, options.report)
    return _rows("model", models.size.name, models.dtype_name, models.ids_BL.numel(), times)


def gate(options: Options) -> list[Check]:
    """Every case that `run` measures."""
    checks = [check for block in _blocks(options) for check in _gate_block(block)]
    return checks + [check for models in _models(options) for check in _gate_models(models)]


def run(options: Options) -> list[Row]:
    """Measure every case."""
    rows = [row for block in _blocks(options) for row in _measure_block(block, options)]
    return rows + [row for models in _models(options) for row in _measure_models(models, options)]


BENCHMARK = Benchmark(
    name="cpu-train",
    description="forward and backward on the CPU against transformers: one MoE block, and a small language model",
    columns=(
        "part",
        "case",
        "dtype",
        "implementation",
        *TIMING_COLUMNS,
        "tokens_per_s",
        "gflop_per_s",
        "speedup",
        "of_dense",
        "note",
    ),
    table=(
        "case",
        "dtype",
        "implementation",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "tokens_per_s",
        "gflop_per_s",
        "speedup",
        "of_dense",
        "note",
    ),
    gate=gate,
    run=run,
)
