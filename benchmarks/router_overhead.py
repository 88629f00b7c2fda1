"""`router-overhead`: what routing costs on the CPU beside the experts, forward and backward, for every sparse router.

A layer runs once as it is and once without its experts: there the exchange, which runs the experts, only sorts the assignments
and lets tokens and gradients pass. What is left is all that routing is: projection, scores, choice, weights, counts, balance
loss, metrics, sorting, and their backward. The projection (tokens times the E x D gate in fp32) is timed by itself and taken off,
since it is a matmul like those of the experts.

Shares are of one and the same layer, that of `topk`: some routers use all experts at first, which would hide their routing
behind a larger layer. ``experts`` says how many a token had.

Legend: T tokens (B sequences of length L), D model, F expert FFN, E experts, K top-k, N assignments.
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cpu_train import DTYPES, Shape
from benchmarks.spec import Benchmark, Check, Options, Row
from benchmarks.timing import TIMING_COLUMNS, in_turns
from benchmarks.verify import compare
from moe.experts import ExpertBank
from moe.kernels import grouped, reference
from moe.layer import MoELayer, MoESpec
from moe.routers import ROUTERS
from moe.types import Routing, TokenInfo

SHAPE = Shape(num_tokens=2048, dim=1024, num_experts=64, top_k=8, hidden=1024)
GATE_SHAPE = Shape(num_tokens=192, dim=48, num_experts=64, top_k=8, hidden=16)
QUICK_SHAPE = Shape(num_tokens=64, dim=32, num_experts=8, top_k=2, hidden=16)
NUM_SEQUENCES = 8
TARGET_PERCENT = 5.0  # of the `topk` layer's time, for its routing without the projection
# Methods with one expert per token; the others get K where their options have a word for it.
ONE_EXPERT = ("switch", "sparsemixer", "hash", "kmeans", "round_robin", "sinkhorn")
LAYER, PROJECTION = "topk layer", "projection"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape in one dtype: tokens, the gradient that comes back, and vocabulary ids."""

    shape: Shape
    dtype_name: str
    x_BLD: Tensor
    dy_BLD: Tensor
    ids_T: Tensor

    @property
    def name(self) -> str:
        return f"{self.shape.name} {self.dtype_name}"


def make_case(shape: Shape, dtype_name: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    x_BLD, dy_BLD = torch.randn(2, NUM_SEQUENCES, shape.num_tokens // NUM_SEQUENCES, shape.dim, generator=generator).to(
        DTYPES[dtype_name]
    )
    ids_T = torch.randint(32000, (shape.num_tokens,), generator=generator)
    return Case(shape=shape, dtype_name=dtype_name, x_BLD=x_BLD, dy_BLD=dy_BLD, ids_T=ids_T)


def make_layer(name: str, case: Case, hidden: int) -> MoELayer:
    """A layer in training whose logits have deviation 1 where its router is linear."""
    fields = {field.name for field in dataclasses.fields(ROUTERS[name].Config)}
    router: dict[str, Any] = {"name": name}
    if name not in ONE_EXPERT:
        router |= {key: case.shape.top_k for key in ("top_k", "target_k", "capacity") if key in fields}
    layer = MoELayer(case.shape.dim, MoESpec(num_experts=case.shape.num_experts, expert_hidden=hidden, router=router))
    torch.manual_seed(0)
    layer.reset_parameters(case.shape.dim**-0.5)
    layer.context.input_ids_T = case.ids_T
    return layer.to(DTYPES[case.dtype_name])


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_N: Tensor, dweights_N: Tensor) -> Tensor:
        ctx.dweights_N = dweights_N
        return x_TD.detach()

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        return dy_TD, ctx.dweights_N, None


def without_experts(x_TD: Tensor, routing: Routing, experts: ExpertBank, meanwhile: object = None) -> Tensor:
    """In the place of a layer's exchange: what the experts need of the routing, and no expert."""
    grouped.sort_by_expert(routing)
    return _PassThrough.apply(x_TD, routing.weights_N, upstream(routing.weights_N))


def upstream(weights_N: Tensor) -> Tensor:
    """Gradient of the weights where no expert gives one; a token's differ, since renormalised weights cancel their mean."""
    return torch.arange(weights_N.numel()).float().cos()


def with_reference(x_TD: Tensor, routing: Routing, experts: ExpertBank, meanwhile: object = None) -> Tensor:
    """In the place of a layer's exchange: the experts by the reference loop."""
    return reference.expert_ffn(x_TD, routing, experts.gate_up_proj, experts.down_proj, experts.activation)


def _step(layer: MoELayer, case: Case) -> dict[str, Tensor]:
    """Forward and backward; the output, and every gradient that there is."""
    torch.manual_seed(1)
    layer.zero_grad()
    x_BLD = case.x_BLD.detach().requires_grad_()
    y_BLD = layer(x_BLD)
    y_BLD.backward(case.dy_BLD)
    assert x_BLD.grad is not None
    found = {"y": y_BLD.detach(), "dx": x_BLD.grad}
    return found | {f"d {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}


def _project(weight_ED: Tensor, case: Case) -> None:
    weight_ED.grad = None
    x_TD = case.x_BLD.view(-1, case.shape.dim).detach().requires_grad_()
    logits_TE = F.linear(x_TD.float(), weight_ED.float())
    logits_TE.backward(torch.ones_like(logits_TE))


def _route(layer: MoELayer, case: Case) -> Any:
    torch.manual_seed(1)
    return layer.router(
        case.x_BLD.view(-1, case.shape.dim), TokenInfo(num_sequences=NUM_SEQUENCES, input_ids_T=case.ids_T)
    )


def sparse_routers(case: Case) -> list[str]:
    """Names of the routers that return a `Routing`."""
    return [name for name in ROUTERS if isinstance(_route(make_layer(name, case, 1), case), Routing)]


def loop_topk(logits_TE: Tensor, top_k: int) -> tuple[list[int], Tensor]:
    """Expert ids and renormalised softmax weights token by token, with gradient."""
    ids: list[int] = []
    weights: list[Tensor] = []
    for logits_E in logits_TE:
        exps = [torch.exp(logit - logits_E.max().detach()) for logit in logits_E]
        chosen = sorted(range(len(exps)), key=lambda expert: -float(exps[expert].detach()))[:top_k]
        total = torch.stack([exps[expert] for expert in chosen]).sum()
        ids += chosen
        weights += [exps[expert] / total for expert in chosen]
    return ids, torch.stack(weights)


def _gate_topk(case: Case) -> list[Check]:
    """The default router against a loop over tokens: choices, counts, weights, and both gradients of the weights."""
    layer = make_layer("topk", case, 1)
    weight_ED = layer.router.get_parameter("weight")
    x_TD = case.x_BLD.view(-1, case.shape.dim).detach().requires_grad_()
    routing = layer.router(x_TD)
    assert isinstance(routing, Routing)
    upstream_N = upstream(routing.weights_N)
    got = dict(zip(("dx", "dgate"), torch.autograd.grad(routing.weights_N, (x_TD, weight_ED), upstream_N), strict=True))
    x64_TD, weight64_ED = (leaf.detach().double().requires_grad_() for leaf in (x_TD, weight_ED))
    ids, weights_N = loop_topk(x64_TD @ weight64_ED.T, case.shape.top_k)
    gradients = torch.autograd.grad(weights_N, (x64_TD, weight64_ED), upstream_N.double())
    expected = dict(zip(("dx", "dgate"), gradients, strict=True))
    wrong = sum(a != b for a, b in zip(routing.expert_ids_N.tolist(), ids, strict=True))
    counts = [ids.count(expert) for expert in range(case.shape.num_experts)]
    return [
        Check(name=f"{case.name}, topk: other experts than the loop's", error=float(wrong), limit=0.0),
        Check(name=f"{case.name}, topk: other counts", error=float(routing.counts_E.tolist() != counts), limit=0.0),
        *compare(f"{case.name}, topk", {"weights": routing.weights_N}, {"weights": weights_N}, torch.float32),
        *compare(f"{case.name}, topk", got, expected, DTYPES[case.dtype_name]),
    ]


def _gate_layer(name: str, case: Case) -> list[Check]:
    """The layer with the router, against its experts by the reference loop."""
    layer = make_layer(name, case, case.shape.hidden)
    got = {key: value.clone() for key, value in _step(layer, case).items()}
    layer.exchange = with_reference
    return compare(f"{case.name}, {name}", got, _step(layer, case), DTYPES[case.dtype_name])


def _cases(options: Options, shape: Shape) -> list[Case]:
    return [make_case(QUICK_SHAPE if options.quick else shape, dtype_name) for dtype_name in DTYPES]


def gate(options: Options) -> list[Check]:
    """Small layers with every router that is measured."""
    checks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about groups that are small here
        for case in _cases(options, GATE_SHAPE):
            checks += _gate_topk(case)
            for name in sparse_routers(case):
                checks += _gate_layer(name, case)
    return checks


def _measure(case: Case, options: Options) -> list[Row]:
    options.report(f"{case.name}")
    whole = make_layer("topk", case, case.shape.hidden)
    weight_ED = whole.router.get_parameter("weight").detach().clone().requires_grad_()
    functions: dict[str, Callable[[], object]] = {
        LAYER: lambda: _step(whole, case),
        PROJECTION: lambda: _project(weight_ED, case),
    }
    assigned, learned = {}, set()
    for name in sparse_routers(case):
        layer = make_layer(name, case, 1)
        if list(layer.router.parameters()):
            learned.add(name)
        assigned[name] = _route(layer, case).expert_ids_N.numel() / case.shape.num_tokens
        layer.exchange = without_experts
        functions[name] = lambda layer=layer: _step(layer, case)
    times = in_turns(functions, options.repeats, options.wait_s, options.report)
    layer_ms, projection_ms = (times[name].quantile_ms(0.5) for name in (LAYER, PROJECTION))
    rows: list[Row] = []
    for name, timing in times.items():
        row: Row = {"case": case.shape.name, "dtype": case.dtype_name, "part": name, **timing.columns()}
        row["of_layer_percent"] = round(100 * timing.quantile_ms(0.5) / layer_ms, 2)
        row["experts"] = round(assigned[name], 2) if name in assigned else None
        if name in learned:  # the others project nothing, or only forward
            rest_ms = timing.quantile_ms(0.5) - projection_ms
            percent = round(100 * rest_ms / layer_ms, 2)
            row |= {"rest_ms": round(rest_ms, 3), "rest_percent": percent}
            if name == "topk" and not options.quick:
                verdict = "met" if percent < TARGET_PERCENT else "missed"
                row["note"] = f"target: below {TARGET_PERCENT:g} %, {verdict}"
        rows.append(row)
    return rows


def run(options: Options) -> list[Row]:
    """Measure every router in both dtypes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about groups that are small here
        return [row for case in _cases(options, SHAPE) for row in _measure(case, options)]


BENCHMARK = Benchmark(
    name="router-overhead",
    description="time of each sparse router, statistics and sorting included, beside the whole MoE layer on the CPU",
    columns=(
        "case",
        "dtype",
        "part",
        *TIMING_COLUMNS,
        "of_layer_percent",
        "experts",
        "rest_ms",
        "rest_percent",
        "note",
    ),
    table=(
        "dtype",
        "part",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "of_layer_percent",
        "experts",
        "rest_ms",
        "rest_percent",
        "note",
    ),
    gate=gate,
    run=run,
)
