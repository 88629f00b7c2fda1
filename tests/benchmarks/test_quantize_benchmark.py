"""`quantize`: the gate sees a wrong rounding, rows say what was measured, starved experts are, and a stopped run goes on."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.finished import Finished
from benchmarks.quantize import benchmark
from benchmarks.quantize.cells import (
    PARTS,
    QUALITY,
    ablation_cells,
    method_options,
    options_of,
    quality_cells,
    starved_cells,
)
from benchmarks.quantize.describe import apart
from benchmarks.quantize.evaluate import Reference, overlap
from benchmarks.quantize.models import CARVED, QUICK_VOCAB, make_models
from benchmarks.quantize.quantized import simulate
from benchmarks.quantize.size import matrix_bits, megabytes
from benchmarks.quantize.starve import restore_routing, selection_biases, write_starved
from benchmarks.record import ENVIRONMENT
from benchmarks.spec import Options
from moe.models.compare import load_folder
from moe.models.evaluate import perplexity
from moe.models.folder import ModelFolder
from moe.quant.grids import IntGrid, Mxfp4Grid
from moe.quant.schemes import SCHEMES

QUICK = Options(quick=True, repeats=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"), quick=True)


@pytest.fixture
def setting(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> benchmark.Setting:
    monkeypatch.setattr(benchmark, "make_models", lambda *args: folders)
    return benchmark.set_up(tmp_path, QUICK)


def test_models_differ_in_their_experts_and_are_left_alone(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        model = load_folder(folder)
        assert model.dtype == torch.bfloat16, name
        assert all(apart(layer.mlp.experts.down_proj.detach().flatten(1)) > 0.1 for layer in model.model.layers)
    before = {path: path.stat().st_mtime_ns for path in folders[CARVED].iterdir()}
    make_models(folders[CARVED].parent, quick=True)
    assert before == {path: path.stat().st_mtime_ns for path in folders[CARVED].iterdir()}


def test_gate(setting: benchmark.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "set_up", lambda *args: setting)
    checks = benchmark.gate(QUICK)
    assert len(checks) == 2 * len(benchmark.GATED)
    assert all(check.passed for check in checks)


@pytest.mark.slow
def test_gate_is_red_where_activations_stay(setting: benchmark.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "set_up", lambda *args: dataclasses.replace(setting, scratch=setting.scratch / "b"))
    (setting.scratch / "b").mkdir()
    monkeypatch.setattr(benchmark, "quantize_activations", lambda module, grid: None)
    red = {check.name.split(",")[1] for check in benchmark.gate(QUICK) if not check.passed}
    assert red == {" w8a8: logits", " w4a4: logits", " fp8: logits"}


def test_reference_agrees_with_itself_and_not_with_another(setting: benchmark.Setting, tmp_path: Path) -> None:
    windows_BL = setting.text.held_out[0]
    reference = Reference(setting.folders[CARVED], windows_BL, tmp_path)
    model = load_folder(setting.folders[CARVED], torch.float32)
    assert reference.perplexity == pytest.approx(perplexity(model, windows_BL)["perplexity"], rel=1e-5)
    same = reference.compare(model)
    assert (same.kl, same.same_top1, same.same_experts, same.same_set) == (0.0, 1.0, 1.0, 1.0)
    assert same.of_reference == pytest.approx(1.0, abs=1e-6)
    model.model.layers[0].mlp.router.weight.data.neg_()
    other = reference.compare(model)
    assert other.kl > 0
    assert other.same_experts < 1
    model.model.norm.weight.data[0] = torch.nan
    assert not reference.compare(model).finite


def test_overlap() -> None:
    first, second = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [3, 5]])
    assert overlap([first], [second]) == (0.75, 0.5)


def test_starved_experts_get_few_tokens_and_their_routing_comes_back(
    setting: benchmark.Setting, tmp_path: Path
) -> None:
    source = setting.folders[CARVED]
    windows_BL = torch.randint(QUICK_VOCAB, (16, 32), generator=torch.Generator().manual_seed(0))
    assert write_starved(source, tmp_path / "starved", windows_BL) < 0.01
    model, counts = load_folder(tmp_path / "starved", torch.float32), []
    for layer in model.model.layers:
        layer.mlp.router.register_forward_hook(lambda router, args, routing: counts.append(routing.counts_E))
    with torch.no_grad():
        model(input_ids=windows_BL)
    for counts_E in counts:
        assert sorted(counts_E.tolist())[1] < 0.01 * windows_BL.numel()
        assert sorted(counts_E.tolist())[2] > 0.1 * windows_BL.numel()
    restore_routing(model, source)
    for name, bias_E in selection_biases(model).items():
        assert torch.equal(bias_E, ModelFolder(source).read(name))


def test_sizes() -> None:
    assert matrix_bits(IntGrid(bits=4, group_size=64), 10, 128) == 10 * (128 * 4 + 2 * 16)
    assert matrix_bits(IntGrid(bits=3, symmetric=False), 10, 128) == 10 * (128 * 3 + 16 + 3)
    assert matrix_bits(Mxfp4Grid(), 10, 128) == 10 * (128 * 4 + 4 * 8)


def test_megabytes_in_bf16_are_those_of_the_tensors(folders: dict[str, Path]) -> None:
    for folder in map(ModelFolder, folders.values()):
        found = sum(folder.read(name).nbytes for name in folder.names) / 1e6
        assert megabytes(folder.config, None) == pytest.approx(found, rel=1e-3)


def test_megabytes_of_eight_bits_are_those_of_the_tensors(setting: benchmark.Setting) -> None:
    options, out = method_options("w8a8", "rtn", 0), setting.scratch / "w8a8"
    simulate(setting.folders[CARVED], out, options, setting.text.held_out[0])
    folder = ModelFolder(out)
    found = sum(folder.read(name).nbytes for name in folder.names) / 1e6
    assert megabytes(ModelFolder(setting.folders[CARVED]).config, options) == pytest.approx(found, rel=1e-3)


def test_rows_and_a_run_that_was_stopped(setting: benchmark.Setting, tmp_path: Path) -> None:
    finished, reports = Finished(tmp_path / "partial.jsonl"), []
    rows = benchmark.ROWS["quality"](setting, QUICK, finished)
    assert [row["method"] for row in rows] == [cell.method for cell in quality_cells(quick=True)]
    assert all(row.keys() <= {*ENVIRONMENT, *benchmark.COLUMNS} for row in rows)
    assert all(row["finite"] == 1 for row in rows)
    by_name = {(row["model"], row["scheme"], row["method"]): row for row in rows}
    assert by_name[CARVED, "w8a8", "rtn"]["kl"] < by_name[CARVED, "w4a4", "rtn"]["kl"]
    assert by_name[CARVED, "w4a4", "rtn"]["mb"] < by_name[CARVED, "w8a8", "rtn"]["mb"]
    options = dataclasses.replace(QUICK, report=reports.append)
    again = benchmark.ROWS["quality"](setting, options, Finished(tmp_path / "partial.jsonl"))
    assert again == rows
    assert not reports, "finished cells were made again"


@pytest.mark.slow
def test_ablation_rows(setting: benchmark.Setting) -> None:
    rows = benchmark.ROWS["ablation"](setting, QUICK, Finished(None))
    assert all(row.keys() <= {*ENVIRONMENT, *benchmark.COLUMNS} for row in rows)
    on = [tuple(row[part] for part in PARTS) for row in rows if row["method"] == "gptq"]
    assert len(set(on)) == 8
    kls = {tuple(row[part] for part in PARTS): row["kl"] for row in rows if row["method"] == "gptq"}
    assert kls["x", "-", "-"] != kls["-", "-", "-"]
    assert kls["-", "-", "x"] != kls["-", "-", "-"]


@pytest.mark.slow
def test_starved_rows(setting: benchmark.Setting) -> None:
    rows = benchmark.ROWS["starved"](setting, QUICK, Finished(None))
    assert all(row.keys() <= {*ENVIRONMENT, *benchmark.COLUMNS} for row in rows)
    assert all(row["finite"] == 1 for row in rows)
    assert {row["calibration"] for row in rows} == {"ordinary", "starved"}
    assert all((row["starved_share"] is not None) == (row["calibration"] == "starved") for row in rows)


def test_the_tables_are_what_was_asked_for() -> None:
    cells = quality_cells(quick=False) + ablation_cells(quick=False) + starved_cells(quick=False)
    assert len({cell.key for cell in cells}) == len(cells)
    assert QUALITY.keys() == SCHEMES.keys()
    for scheme in ("w4a4", "w3a4"):
        assert {"rtn", "smoothquant", "gptq", "eaquant"} <= set(QUALITY[scheme])
    # Of every method that sees text.
    assert {cell.options.seed for cell in cells if cell.part == "quality" and cell.method == "gptq"} == {0, 1}
    for name in SCHEMES:
        options = options_of(name, {}, 0)
        for columns in (576, 192, 1536):
            options.resolved().weights.check(columns, name)


@pytest.mark.slow
def test_export_rows(setting: benchmark.Setting) -> None:
    for package in ("compressed_tensors", "gguf", "llama_cpp"):
        pytest.importorskip(package)
    rows = benchmark.ROWS["export"](setting, QUICK, Finished(None))
    assert all(row.keys() <= {*ENVIRONMENT, *benchmark.COLUMNS} for row in rows)
    assert [row["server"] for row in rows] == ["transformers", "llama.cpp"] * 2
    for row in rows:
        if row["server"] == "transformers":
            assert row["max_diff"] < 1e-2
        else:
            assert row["same_top1"] > 0.9
