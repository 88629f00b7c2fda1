"""Folders as compressed-tensors 0.20 writes them: its own code makes the same tensors of the same codes and scales."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.stock.stock_cases import STOCK
from quant.containers.quantized_folders import WIDE, scheme_of, source_folder, target_of, write_quantized
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from moe.models.folder import ModelFolder
from moe.quant.containers import CONTAINERS, container_of
from moe.quant.containers.parts import PartFolder
from moe.quant.load import load_simulated

HELD = CONTAINERS["compressed-tensors"]
# Scheme and group size, and the preset of the package that it is, with the preset's groups in place of its own.
SCHEMES = {
    ("w8a16", None): "W8A16",
    ("w8a16", 32): "W8A16",
    ("w4a16", 32): "W4A16",
    ("w3a16", 32): "W3A16",
    ("w8a8", None): "W8A8",
    ("w4a8", 32): "W4A8",
    ("fp8", None): "FP8_DYNAMIC",
    ("mxfp4", None): "MXFP4A16",
}
LOADED_BY_TRANSFORMERS = [case for case in SCHEMES if case[0] not in ("w8a8", "w4a8")]
FEW = [("w4a16", 32)]  # where the architecture is what differs
ids = [f"{scheme}-{group_size}" for scheme, group_size in SCHEMES]


def package_scheme(scheme: str, group_size: int | None) -> Any:
    """The preset, with other groups where they are not its own."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    preset = preset_name_to_scheme(SCHEMES[scheme, group_size], ["Linear"])
    values = preset.model_dump()
    if scheme not in ("fp8", "mxfp4", "w8a8"):
        values["weights"] |= {"group_size": group_size, "strategy": "group" if group_size else "channel"}
    return QuantizationScheme.model_validate(values)


def parts_of(folder: ModelFolder, stem: str) -> dict[str, Tensor]:
    """Stored tensors of one matrix."""
    return {
        name.removeprefix(f"{stem}."): folder.read(name) for name in folder.names if name.startswith(f"{stem}.weight")
    }


@pytest.mark.parametrize(("scheme", "group_size"), SCHEMES, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_package_makes_the_same_tensors(
    scheme: str, group_size: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Let it compress the weights with our scales, and decompress what we wrote."""
    theirs = package_scheme(scheme, group_size)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format

    source = source_folder("mixtral", tmp_path / "source")
    write_quantized(source, tmp_path, tmp_path / "out", scheme_of(scheme, group_size), HELD.name, dtype)
    folder = ModelFolder(tmp_path / "out")
    format_name = infer_module_format(torch.nn.Linear, theirs).value
    assert folder.config.quantization_config["format"] == format_name
    compressor = BaseCompressor.get_value_from_registry(format_name)
    codes, scales = HELD.views(folder)  # type: ignore[attr-defined]
    grid = HELD.read_scheme(folder).weights
    assert isinstance(codes, PartFolder) and len(codes.matrices) == 3 * (4 + 3 * 4)
    for name in sorted(codes.matrices):
        scale = scales.read(name)
        exact = grid.decode(grid.grouped(codes.read(name)), scale[..., None], None).flatten(-2)
        stored = parts_of(folder, name.removesuffix(".weight"))
        # In fp32: it would round quotients to bf16 before it rounds them to codes. Scales have values of the checkpoint's dtype.
        made = compressor.compress({"weight": source.read(name).to(dtype).float(), "weight_scale": scale}, theirs)
        assert set(stored) == set(made), name
        for part, tensor in stored.items():
            expected = made[part] if part != "weight_scale" or scheme == "mxfp4" else made[part].to(dtype)
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), f"{name} {part}"
        read = compressor.decompress(stored, theirs)["weight"]
        torch.testing.assert_close(read.float(), exact.to(read.dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize(("scheme", "group_size"), SCHEMES, ids=ids)
def test_the_package_says_the_same_of_the_model(scheme: str, group_size: int | None, tmp_path: Path) -> None:
    """Its config for the stock model, quantised by it, has the fields and values of ours."""
    theirs = package_scheme(scheme, group_size)
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    source = source_folder("qwen2_moe", tmp_path / "source")
    theirs.format = infer_module_format(torch.nn.Linear, theirs)
    ignored = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]
    config = QuantizationConfig(config_groups={"group_0": theirs}, ignore=ignored)
    model = AutoModelForCausalLM.from_pretrained(source.path)
    apply_quantization_config(model, config)
    written = QuantizationConfig.from_pretrained(model, theirs.format).model_dump(mode="json")
    ours = HELD.quantization_config(target_of(source, scheme_of(scheme, group_size), "qwen2_moe"))
    assert json.loads(json.dumps(ours)) == ours, "plain data"
    for field in ("config_groups", "quant_method", "format", "kv_cache_scheme", "global_compression_ratio"):
        assert ours[field] == written[field], field
    assert set(written["ignore"]) <= set(ours["ignore"]), "transformers' routers are no Linear; those of servers are"
    assert QuantizationConfig.model_validate(ours).quantization_status.value == "compressed"


@pytest.mark.parametrize("kind", WIDE)
def test_gates_are_ignored_and_stay(kind: str, tmp_path: Path) -> None:
    """Nothing that decides where tokens go is quantised, and every module without a scale is in the list."""
    source = source_folder(kind, tmp_path / "source")
    write_quantized(source, tmp_path, tmp_path / "out", scheme_of("w8a8"), HELD.name)
    folder = ModelFolder(tmp_path / "out")
    kept = {name for name in source.names if name in folder and folder.read(name).dtype == torch.float32}
    ignore = folder.config.quantization_config["ignore"]
    plain = {name for name in kept if len(source.shape(name)) == 2 and name != "model.embed_tokens.weight"}
    assert {name.removesuffix(".weight") for name in plain} == set(ignore)
    biases = {name for name in source.names if name.endswith("e_score_correction_bias")}
    assert biases <= kept and bool(biases) == ("n_group" in STOCK[kind][1])
    for name in kept:
        assert torch.equal(folder.read(name), source.read(name)), name


@pytest.mark.parametrize("kind", WIDE)
def test_what_is_written_is_read_again(kind: str, tmp_path: Path) -> None:
    source = source_folder(kind, tmp_path / "source")
    for scheme, group_size in SCHEMES if kind == "mixtral" else FEW:
        wanted, out = scheme_of(scheme, group_size), tmp_path / f"{scheme}-{group_size}"
        model = write_quantized(source, tmp_path, out, wanted, HELD.name, torch.bfloat16)
        folder = ModelFolder(out)
        assert container_of(folder) is HELD and HELD.read_scheme(folder) == wanted
        for index, layer in enumerate(model.model.layers):
            got, state = HELD.read_layer(folder, index), layer.state_dict()
            values = {name: rounded.dequantize() for name, rounded in got.rounded.items()} | got.rest
            assert set(values) == set(state)
            assert all(torch.equal(values[name].float(), state[name]) for name in state)


@pytest.mark.parametrize("kind", WIDE)
def test_transformers_computes_the_same(kind: str, tmp_path: Path) -> None:
    """In this process; `verify_folder` does it in one that does not know us."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    source = source_folder(kind, tmp_path / "source")
    ids_BL = torch.randint(2, 48, (2, 16))
    for scheme, group_size in LOADED_BY_TRANSFORMERS if kind == "mixtral" else FEW:
        out = tmp_path / f"{scheme}-{group_size}"
        write_quantized(source, tmp_path, out, scheme_of(scheme, group_size), HELD.name)
        stock, report = AutoModelForCausalLM.from_pretrained(
            out, quantization_config=CompressedTensorsConfig(dequantize=True), output_loading_info=True
        )
        assert not any(report.values())
        with torch.no_grad():
            expected = load_simulated(out, round_activations=False)(ids_BL).logits
            # Experts of mxfp4 are in bf16 then, whatever the model is.
            torch.testing.assert_close(stock.float()(ids_BL).logits, expected, rtol=0, atol=2e-5)


def test_refusals(tmp_path: Path) -> None:
    source = source_folder("mixtral", tmp_path / "source")
    with pytest.raises(
        ValueError, match=r"--scheme w4a4 .* no server .*use one of w8a16, .*mxfp4, or --container simulated"
    ):
        HELD.check(target_of(source, scheme_of("w4a4"), "mixtral"))
    with pytest.raises(ValueError, match=r"--to 'moe' is no architecture that servers load; use one of mixtral"):
        HELD.check(target_of(source, scheme_of("w4a16"), "moe"))


def test_a_scheme_of_others_is_refused(tmp_path: Path) -> None:
    source = source_folder("mixtral", tmp_path / "source")
    assert container_of(source) is None
    write_quantized(source, tmp_path, tmp_path / "out", scheme_of("w8a16"), HELD.name)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is none of w8a16, w4a16"):
        load_simulated(tmp_path / "out")
    config["quantization_config"]["quant_method"] = "gptq"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised by 'gptq'; only compressed-tensors, moe_simulated are read"):
        load_simulated(tmp_path / "out")
