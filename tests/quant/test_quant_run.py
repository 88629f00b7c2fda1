"""The engine: what is stored is what was simulated, errors are measured right, and it goes on where it was."""

import json
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models.stock.stock_cases import logits
from models.tiny import make_model
from quant.quantize_case import RESERVE, TEXT, WINDOWS, all_bytes, plan_of, stock_folder

from moe.models.compare import load_folder
from moe.models.folder import ModelFolder
from moe.parallel.checkpoint.tensor_file import write_tensors
from moe.quant import run as engine
from moe.quant import work as work_module
from moe.quant.layer import matrices
from moe.quant.load import load_simulated
from moe.quant.plan import Plan
from moe.quant.report import REPORT_FILE, LayerReport
from moe.quant.run import CalibrationText, Callbacks, quantize
from moe.quant.step import quantize_layer
from moe.quant.walk import QuantWalk
from moe.quant.work import SUFFIX, WorkFolder

PLAIN = CalibrationText(windows_BL=WINDOWS)
METHODS = [
    {"scheme": "w8a16"},
    {"scheme": "w4a16", "rounding": "gptq"},
    {"scheme": "w8a8", "scaling": "smoothquant"},
    {"scheme": "w4a4", "scaling": "eaquant", "rounding": "gptq", "balance": 2.0, "align_router": True},
    {"scheme": "w4a16", "scaling": "awq", "container": "simulated"},
    {"scheme": "w3a4", "rounding": "gptq", "rotate": True},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_folder_computes_what_the_walk_did(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits of the loaded folder are those of the last residual stream, in which the next layers were calibrated."""
    source = stock_folder(tmp_path / "source", dtype=dtype)
    streams: list[Any] = []
    write_stream = WorkFolder.write_stream
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "write_stream", lambda self, s: (streams.append(s), write_stream(self, s)))
        report = quantize(plan_of(source, **options), tmp_path / "out", TEXT if options.get("balance") else PLAIN)
    model = load_simulated(tmp_path / "out")
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(streams[-1].hidden_BLD[: len(WINDOWS)]))
    torch.testing.assert_close(logits(model, WINDOWS), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    reference = logits(load_folder(source.path, torch.float32), WINDOWS)
    assert 0 < (expected - reference).norm() < 0.7 * reference.norm()
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text()) == report.to_dict()
    assert not (tmp_path / f"out{SUFFIX}").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_only_simulated_schemes_round_the_router(tmp_path: Path) -> None:
    """Its 8-bit values have more digits than bf16, in which servers' routers stay."""
    source = stock_folder(tmp_path / "source", "mixtral", torch.bfloat16)
    method = {"scaling": "eaquant", "align_router": True}
    quantize(plan_of(source, "w4a4", **method), tmp_path / "simulated", PLAIN)
    quantize(plan_of(source, "w8a8", **method), tmp_path / "served", PLAIN)
    router = ModelFolder(tmp_path / "simulated").read("model.layers.0.mlp.router.weight")
    assert not torch.equal(router, router.bfloat16().float())
    served = ModelFolder(tmp_path / "served").read("model.layers.0.block_sparse_moe.gate.weight")
    assert served.dtype == torch.bfloat16


def test_errors_are_those_of_the_matrices(tmp_path: Path) -> None:
    """Of the first layer, whose inputs are the source's own, by plain products."""
    source = stock_folder(tmp_path / "source", "glm4_moe-whole")
    report = quantize(plan_of(source, "w4a16"), tmp_path / "out", PLAIN).layers[0]
    quantized = load_simulated(tmp_path / "out").model.layers[0]
    walk = QuantWalk(source)
    original = walk.load(0, walk.stored(0))
    found = walk.run(0, walk.embed(WINDOWS), WINDOWS, note_linear=True, note_ffn=True)
    errors = {matrix.name: matrix for matrix in report.matrices}
    after = {(m.name, m.expert): m.weight_PQ for m in matrices(quantized)}
    wrong: dict[str, float] = {}
    whole: dict[str, float] = {}
    for matrix in matrices(original):
        if matrix.expert is None:
            x_nQ = found.linear[matrix.name.removesuffix(".weight")]
        else:
            routed = found.routed
            x_nQ = found.ffn_TD[routed.token_ids_N[routed.expert_ids_N == matrix.expert].sort().values]
        if matrix.name.endswith("experts.down_proj"):  # sees what the quantised up-projection makes
            gate_nF, up_nF = (x_nQ @ after["mlp.experts.gate_up_proj", matrix.expert].T).chunk(2, -1)
            x_nQ = torch.nn.functional.silu(gate_nF) * up_nF
        y_nP = x_nQ @ matrix.weight_PQ.T
        lost = x_nQ @ after[matrix.name, matrix.expert].T - y_nP
        wrong[matrix.name] = wrong.get(matrix.name, 0.0) + float(lost.square().sum())
        whole[matrix.name] = whole.get(matrix.name, 0.0) + float(y_nP.square().sum())
    assert len(wrong) == 8
    for name, lost in wrong.items():
        assert errors[name].error == pytest.approx((lost / whole[name]) ** 0.5, rel=1e-4), name
    assert errors["mlp.experts.gate_up_proj"].worst_error >= errors["mlp.experts.gate_up_proj"].error
    reference = found.after_BLD[:4]
    with torch.no_grad():
        walk.load(0, quantized.state_dict())
        got = walk.run(0, walk.embed(WINDOWS), WINDOWS)
    wrong_BL = (got.after_BLD[:4] - reference).norm(dim=-1) / reference.norm(dim=-1)
    assert report.stream_error == pytest.approx(float(wrong_BL.square().mean().sqrt()), rel=1e-3)
    same = (got.routed.chosen_TE()[:64] & found.routed.chosen_TE()[:64]).sum() / (64 * 2)
    assert report.router_agreement == pytest.approx(float(same))


def test_a_layer_is_calibrated_on_what_the_quantised_layers_below_leave(tmp_path: Path) -> None:
    """On the calibration text; the reserve, which passes along, is for experts alone."""
    source = stock_folder(tmp_path / "source")
    inputs: list[torch.Tensor] = []

    def noting(module: Any, found: Any, *args: Any, **how: Any) -> Any:
        inputs.append(found.linear["self_attn.q_proj"].clone())
        return quantize_layer(module, found, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "quantize_layer", noting)
        quantize(plan_of(source, "w4a16", balance=2.0), tmp_path / "out", TEXT)
    model = load_simulated(tmp_path / "out")
    for layer, expected in zip(model.model.layers, inputs, strict=True):
        seen: list[torch.Tensor] = []
        hook = layer.self_attn.q_proj.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].flatten(0, 1))
        )
        logits(model, WINDOWS)
        hook.remove()
        torch.testing.assert_close(expected, seen[0], atol=1e-4, rtol=1e-4)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A quantisation that nothing stopped."""

    plan: Plan
    files: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    plan = plan_of(stock_folder(folder / "source", dtype=torch.bfloat16), rounding="gptq", balance=2.0)
    start = time.monotonic()
    quantize(plan, folder / "out", TEXT)
    return Whole(plan=plan, files=all_bytes(folder / "out"), seconds=time.monotonic() - start)


class Killed(Exception):
    """In the place of a kill."""


def interrupted(at: int, count: list[int]) -> Callable[..., None]:
    """A function that fails the ``at``-th time that anything is written."""

    def step(*_: Any) -> None:
        count[0] += 1
        if count[0] == at:
            raise Killed

    return step


@pytest.mark.parametrize(("at", "late"), [*((at, False) for at in range(1, 7)), (6, True)])
def test_stopped_anywhere_it_makes_the_same_bits(at: int, late: bool, whole: Whole, tmp_path: Path) -> None:
    """Before every replacement of a file of the work folder, and after the last."""
    out, step, replace = tmp_path / "out", interrupted(at, [0]), WorkFolder._replace

    def stopping(self: WorkFolder, *args: Any) -> None:
        if not late:
            step()
        replace(self, *args)
        if late:
            step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "_replace", stopping)
        with pytest.raises(Killed):
            quantize(whole.plan, out, TEXT)
    assert not out.exists()
    seen: list[LayerReport] = []
    quantize(whole.plan, out, TEXT, callbacks=Callbacks(layer=seen.append))
    assert all_bytes(out) == whole.files
    assert [report.layer for report in seen] == [0, 1, 2]


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_torn_file_is_not_taken_for_a_layer(at: int, whole: Whole, tmp_path: Path) -> None:
    """Stopped while it writes a layer (1), a stream (2), or the stream in the place of one (4)."""
    out, step = tmp_path / "out", interrupted(at, [0])

    def torn(path: Path, *args: Any) -> Any:
        done = write_tensors(path, *args)
        try:
            step()
        except Killed:
            path.write_bytes(path.read_bytes()[:-100])
            raise
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work_module, "write_tensors", torn)
        with pytest.raises(Killed):
            quantize(whole.plan, out, TEXT)
    quantize(whole.plan, out, TEXT)
    assert all_bytes(out) == whole.files


def test_killed_processes_leave_what_the_next_goes_on_from(whole: Whole, tmp_path: Path) -> None:
    """SIGKILL after longer and longer times, until one is through."""
    out = tmp_path / "out"
    codes = []
    for kill in range(12):
        child = multiprocessing.get_context("fork").Process(target=quantize, args=(whole.plan, out, TEXT))
        child.start()
        child.join(whole.seconds * (kill + 1) / 10)
        child.kill()
        child.join()
        codes.append(child.exitcode)
        if out.exists():
            break
    assert codes[0] == -signal.SIGKILL
    if not out.exists():
        quantize(whole.plan, out, TEXT)
    assert all_bytes(out) == whole.files


def test_finished_layers_are_not_made_again(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "source")
    done: list[int] = []

    def stop(report: LayerReport) -> None:
        if report.layer == 1:
            raise Killed

    with pytest.raises(Killed):
        quantize(plan_of(source), tmp_path / "out", PLAIN, callbacks=Callbacks(layer=stop))
    callbacks = Callbacks(matrix=lambda layer, name: done.append(layer))
    quantize(plan_of(source), tmp_path / "out", PLAIN, callbacks=callbacks)
    assert set(done) == {2}


def test_other_settings_are_refused_until_restart(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "source")

    def stop(report: LayerReport) -> None:
        raise Killed

    def begin(**options: Any) -> None:
        with pytest.raises(Killed):
            quantize(plan_of(source, **options), tmp_path / "out", PLAIN, callbacks=Callbacks(layer=stop))

    def stop_early(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:  # nothing is lost yet, so other settings are welcome
        patch.setattr(WorkFolder, "_replace", stop_early)
        begin(rounding="gptq")
    begin()
    with pytest.raises(
        ValueError, match=r"out.quantizing was begun with other settings: rounding was 'rtn' and is 'gptq'"
    ):
        quantize(plan_of(source, rounding="gptq"), tmp_path / "out", PLAIN)
    with pytest.raises(ValueError, match=r"text was .* --restart"):
        quantize(plan_of(source), tmp_path / "out", CalibrationText(windows_BL=RESERVE))
    quantize(plan_of(source, rounding="gptq"), tmp_path / "out", PLAIN, restart=True)
    quantize(plan_of(source, rounding="gptq"), tmp_path / "fresh", PLAIN)
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "fresh")


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "source")

    def stop(report: LayerReport) -> None:
        raise Killed

    with pytest.raises(Killed):
        quantize(plan_of(source), tmp_path / "out", PLAIN, callbacks=Callbacks(layer=stop))
    changed = stock_folder(tmp_path / "source")
    with pytest.raises(ValueError, match="source was"):
        quantize(plan_of(changed), tmp_path / "out", PLAIN)


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "source")
    (tmp_path / f"out{SUFFIX}").mkdir()
    (tmp_path / f"out{SUFFIX}" / "thesis.tex").touch()
    for restart in (False, True):
        with pytest.raises(ValueError, match="was not made by `moe quantize`"):
            quantize(plan_of(source), tmp_path / "out", PLAIN, restart=restart)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken exists; remove it"):
        quantize(plan_of(source), tmp_path / "taken", PLAIN)
    assert (tmp_path / f"out{SUFFIX}" / "thesis.tex").exists()


def test_our_own_format_goes_to_a_stock_one(tmp_path: Path) -> None:
    """Which makes it servable; the rewritten model is what is quantised."""
    make_model("qwen3").eval().save_pretrained(tmp_path / "source")
    plan = plan_of(ModelFolder(tmp_path / "source"), "w8a16")
    assert plan.target.to == "qwen3_moe"
    quantize(plan, tmp_path / "out", PLAIN)
    assert ModelFolder(tmp_path / "out").config.model_type == "qwen3_moe"
    reference = logits(load_folder(tmp_path / "source", torch.float32), WINDOWS)
    got = logits(load_simulated(tmp_path / "out"), WINDOWS)
    assert 0 < (got - reference).norm() < 0.15 * reference.norm()
