"""`exchange`: bytes and time of the expert-parallel exchange, against one row per assignment.

Part ``bytes``: uniform routing with 8 of 256 experts per token, D = 2048 in bf16, counted at the collectives of 2, 4 and 8
gloo processes; all that travels counts (rows, labels, weights, counts), what stays on a rank does not. Part ``time``: forward
and backward of a layer with a shared expert on 2 and 4 processes of this machine, in turns. Processes of one machine
exchange through its memory, so times say what sorting, copying and waiting cost; a network changes the picture in favour of
fewer bytes.

Legend: T tokens per rank, D model, F expert FFN, E experts, K top-k, W ranks.
"""

import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.spec import Benchmark, Check, Options, Row
from benchmarks.timing import TIMING_COLUMNS, Timing, in_turns
from benchmarks.verify import compare, relative_error
from moe.experts import ExpertBank
from moe.layer import MoELayer, MoESpec
from moe.parallel.exchange.config import ExchangeConfig
from moe.parallel.exchange.expert_parallel import ExpertParallelExchange
from moe.parallel.exchange.volume import count_bytes, expected_bytes
from moe.types import Routing

PLAIN = "plain"
EXACT: dict[str, dict[str, Any]] = {
    PLAIN: {"dedup": False},
    "dedup": {},
    "dedup, 2 chunks": {"overlap_chunks": 2},
    "dedup, 4 chunks": {"overlap_chunks": 4},
}
ROUNDED: dict[str, dict[str, Any]] = {"dedup, fp8": {"payload": "fp8"}}
ROUNDED_LIMIT = 0.12  # of RMS error over RMS; an element of a row in e4m3 is off by 2^-4 of itself at most
DIRECTIONS = ("forward dispatch", "forward combine", "backward dispatch", "backward combine")
TIMEOUT_S = 300


def two_stage(num_ranks: int) -> dict[str, dict[str, Any]]:
    """The exchange over two nodes, where there is more than one rank on each."""
    return {"dedup, two-stage": {"hierarchical": num_ranks // 2}} if num_ranks > 2 else {}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes; ``num_tokens`` are those of a rank."""

    num_tokens: int
    dim: int
    hidden: int
    num_experts: int
    top_k: int

    @property
    def name(self) -> str:
        return f"T={self.num_tokens} D={self.dim} F={self.hidden} E={self.num_experts} K={self.top_k}"


GATE_CASE = Case(num_tokens=48, dim=32, hidden=16, num_experts=16, top_k=8)
TIME_CASE = Case(num_tokens=1024, dim=1024, hidden=256, num_experts=64, top_k=8)
BYTES_CASE = Case(num_tokens=1024, dim=2048, hidden=1, num_experts=256, top_k=8)
QUICK_CASE = Case(num_tokens=32, dim=64, hidden=8, num_experts=256, top_k=8)


# ---- processes


def on_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """``function(rank, num_ranks, *args)`` on gloo processes that share this machine's processors; results by rank."""
    with (
        tempfile.TemporaryDirectory(prefix="exchange-") as folder,
        ProcessPoolExecutor(num_ranks, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        started = [pool.submit(_rank_main, folder, function, rank, num_ranks, args) for rank in range(num_ranks)]
        return [one.result() for one in started]


def _rank_main(folder: str, function: Callable[..., Any], rank: int, num_ranks: int, args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(max((os.cpu_count() or 1) // num_ranks, 1))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    result = function(rank, num_ranks, *args)
    dist.barrier()
    dist.destroy_process_group()
    return result


# ---- layers


def make_layer(case: Case) -> MoELayer:
    """The same on every rank."""
    torch.manual_seed(0)
    spec = MoESpec(
        num_experts=case.num_experts,
        expert_hidden=case.hidden,
        num_shared_experts=1,
        router={"name": "topk", "top_k": case.top_k},
    )
    layer = MoELayer(case.dim, spec)
    layer.reset_parameters(case.dim**-0.5)
    return layer


def spread_layer(case: Case, rank: int, num_ranks: int, options: dict[str, Any]) -> MoELayer:
    """With this rank's experts alone."""
    layer, num_local = make_layer(case), case.num_experts // num_ranks
    for name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, nn.Parameter(weight.detach()[rank * num_local : (rank + 1) * num_local].clone()))
    layer.exchange = ExpertParallelExchange(None, rank, num_ranks, ExchangeConfig(**options))
    return layer


def step(layer: MoELayer, case: Case, rank: int) -> dict[str, Tensor]:
    """Forward and backward on this rank's tokens; output and gradients."""
    generator = torch.Generator().manual_seed(1 + rank)
    x_TD, dy_TD = torch.randn(2, case.num_tokens, case.dim, generator=generator)
    layer.zero_grad()
    y_TD = layer(x_TD.requires_grad_())
    y_TD.backward(dy_TD)
    assert x_TD.grad is not None
    found = {"y": y_TD.detach(), "dx": x_TD.grad}
    return found | {f"d {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}


# ---- gate


def _compared(rank: int, num_ranks: int, options_by_name: dict[str, dict[str, Any]]) -> list[Check]:
    case, checks = GATE_CASE, []
    expected = {key: value.clone() for key, value in step(make_layer(case), case, rank).items()}
    mine = slice(rank * case.num_experts // num_ranks, (rank + 1) * case.num_experts // num_ranks)
    for key, value in expected.items():
        if key.startswith("d experts."):
            dist.all_reduce(value)
            expected[key] = value[mine]
    for name, options in options_by_name.items():
        got, where = (
            step(spread_layer(case, rank, num_ranks, options), case, rank),
            f"{num_ranks} ranks, rank {rank}, {name}",
        )
        if name in ROUNDED:
            checks += [
                Check(name=f"{where}: {key}", error=relative_error(got[key], value), limit=ROUNDED_LIMIT)
                for key, value in expected.items()
            ]
        else:
            checks += compare(where, got, expected, torch.float32)
    return checks


def gate(options: Options) -> list[Check]:
    """Every implementation on every number of ranks against the whole layer: outputs and all gradients."""
    checks = []
    for num_ranks in _sizes(options, (2, 4, 8)):
        names = EXACT | ROUNDED | two_stage(num_ranks)
        checks += [check for found in on_ranks(_compared, num_ranks, names) for check in found]
    return checks


def _sizes(options: Options, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes[:1] if options.quick else sizes


# ---- bytes


def _sent(
    rank: int, num_ranks: int, case: Case, options_by_name: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """What this rank sends to others, by direction and in all; and over the middle of the group."""
    rng = random.Random(rank)
    choices = [e for _ in range(case.num_tokens) for e in rng.sample(range(case.num_experts), case.top_k)]
    expert_ids_N = torch.tensor(choices)
    routing = Routing(
        num_tokens=case.num_tokens,
        num_experts=case.num_experts,
        token_ids_N=torch.arange(case.num_tokens).repeat_interleave(case.top_k),
        expert_ids_N=expert_ids_N,
        weights_N=torch.full((len(choices),), 1 / case.top_k, requires_grad=True),
        counts_E=torch.bincount(expert_ids_N, minlength=case.num_experts),
        top_k=case.top_k,
    )
    bank, found = ExpertBank(case.num_experts // num_ranks, case.dim, case.hidden, "gelu").bfloat16(), {}
    for name, options in options_by_name.items():
        x_TD = torch.randn(case.num_tokens, case.dim, dtype=torch.bfloat16, requires_grad=True)
        exchange = ExpertParallelExchange(None, rank, num_ranks, ExchangeConfig(**options))
        with count_bytes(num_ranks // 2) as volume:
            exchange(x_TD, routing, bank).sum().backward()
        found[name] = {way: volume.total(way) for way in (*DIRECTIONS, "")}
        found[name]["between nodes"] = sum(volume.inter.values())
    return found


def measure_bytes(options: Options) -> list[Row]:
    """One row per number of ranks and implementation; sums over ranks."""
    case, rows = QUICK_CASE if options.quick else BYTES_CASE, []
    for num_ranks in _sizes(options, (2, 4, 8)):
        options.report(f"bytes, {num_ranks} ranks")
        names = {PLAIN: EXACT[PLAIN], "dedup": EXACT["dedup"], **ROUNDED, **two_stage(num_ranks)}
        ranks = on_ranks(_sent, num_ranks, case, names)
        sums = {name: {way: sum(r[name][way] for r in ranks) for way in ranks[0][name]} for name in names}
        for name, found in sums.items():
            config = ExchangeConfig(**({"hierarchical": "off"} | names[name]))
            expected = expected_bytes(
                case.num_tokens,
                case.top_k,
                case.num_experts,
                num_ranks,
                case.dim,
                torch.bfloat16,
                config,
                num_ranks // 2,
            )
            row: Row = {"part": "bytes", "case": case.name, "num_ranks": num_ranks, "implementation": name}
            row["total_mb"] = round(found[""] / 1e6, 3)
            row["expected_mb"] = round(num_ranks * expected.total() / 1e6, 3)
            for way in DIRECTIONS:
                row[f"{way.replace(' ', '_')}_share"] = round(found[way] / sums[PLAIN][way], 4)
            row["between_nodes_share"] = round(found["between nodes"] / sums[PLAIN]["between nodes"], 4)
            rows.append(row)
    return rows


# ---- time


def _timed(rank: int, num_ranks: int, case: Case, repeats: int, wait_s: float) -> dict[str, Timing]:
    layers = {name: spread_layer(case, rank, num_ranks, options) for name, options in EXACT.items()}
    steps = {name: lambda layer=layer: step(layer, case, rank) for name, layer in layers.items()}
    # from the moment when all ranks are there until all are done
    return in_turns(steps, repeats, wait_s if rank == 0 else 0.0, synchronize=dist.barrier)


def measure_time(options: Options) -> list[Row]:
    """One row per number of ranks and implementation, forward and backward of the slowest rank."""
    case, rows = QUICK_CASE if options.quick else TIME_CASE, []
    for num_ranks in _sizes(options, (2, 4)):
        options.report(f"time, {num_ranks} ranks")
        times = on_ranks(_timed, num_ranks, case, options.repeats, options.wait_s)[0]
        for name, timing in times.items():
            row: Row = {"part": "time", "case": case.name, "num_ranks": num_ranks, "implementation": name}
            ratio = timing.quantile_ms(0.5) / times[PLAIN].quantile_ms(0.5)
            rows.append(row | timing.columns() | {"time_share": round(ratio, 3)})
    return rows


def run(options: Options) -> list[Row]:
    """Both parts, or the one that was asked for."""
    parts = {"bytes": measure_bytes, "time": measure_time}
    return [row for name, measure in parts.items() if options.part in (None, name) for row in measure(options)]


SHARES = tuple(f"{way.replace(' ', '_')}_share" for way in DIRECTIONS)
BENCHMARK = Benchmark(
    name="exchange",
    description="bytes and time of the expert-parallel exchange against one row per assignment, 2 to 8 processes",
    columns=(
        "part",
        "case",
        "num_ranks",
        "implementation",
        "total_mb",
        "expected_mb",
        *SHARES,
        "between_nodes_share",
        *TIMING_COLUMNS,
        "time_share",
    ),
    table=(
        "num_ranks",
        "implementation",
        "total_mb",
        *SHARES,
        "between_nodes_share",
        "median_ms",
        "p20_ms",
        "p80_ms",
        "waiting",
        "time_share",
    ),
    gate=gate,
    run=run,
    parts=("bytes", "time"),
)
