"""Our own form: read again as it was, by us alone."""

from pathlib import Path

import pytest
import torch
from quant.containers.quantized_folders import scheme_of, source_folder, target_of, write_quantized
from transformers import AutoModelForCausalLM

from moe.models.folder import ModelFolder
from moe.models.verify import run_apart
from moe.quant.containers import CONTAINERS, container_of
from moe.quant.load import is_quantized, load_simulated
from moe.quant.schemes import SCHEMES, SIMULATED
from moe.quant.verify import scan, verify_folder

HELD = CONTAINERS[SIMULATED]


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    source = source_folder("qwen2_moe", tmp_path / "source")
    wanted = scheme_of(name, 32 if name in ("w4a16", "w3a16", "w4a8", "w3a4") else None)
    model = write_quantized(source, tmp_path, tmp_path / "out", wanted, SIMULATED, torch.bfloat16)
    folder = ModelFolder(tmp_path / "out")
    assert container_of(folder) is HELD and HELD.read_scheme(folder) == wanted
    assert not is_quantized(source.path) and is_quantized(folder.path)
    for index, layer in enumerate(model.model.layers):
        got, state = HELD.read_layer(folder, index), layer.state_dict()
        values = {name: rounded.dequantize() for name, rounded in got.rounded.items()} | got.rest
        assert set(values) == set(state)
        assert all(torch.equal(values[name].float(), state[name]) for name in state)
        has_zero = wanted.name in ("w4a4", "w3a4")
        assert all((rounded.scales.zero is not None) == has_zero for rounded in got.rounded.values())
    ids_BL = torch.randint(2, 48, (2, 16))
    loaded = load_simulated(folder.path)
    with torch.no_grad():
        assert torch.equal(loaded(ids_BL).logits, model(ids_BL).logits)
        plain = load_simulated(folder.path, round_activations=False)(ids_BL).logits
    assert torch.equal(plain, loaded(ids_BL).logits) == (wanted.activations is None)
    assert scan(folder) == []
    assert verify_folder(folder.path, ids_BL).loaded_by is None


def test_stock_transformers_refuses_it(tmp_path: Path) -> None:
    source = source_folder("mixtral", tmp_path / "source")
    write_quantized(source, tmp_path, tmp_path / "out", scheme_of("w4a4"), SIMULATED)
    with pytest.raises(ValueError, match="moe_decoder"):
        run_apart(tmp_path / "out", torch.tensor([[2, 3]]), torch.float32, tmp_path / "logits")


def test_our_own_class_does_not_load_random_weights(tmp_path: Path) -> None:
    """transformers skips a ``quant_method`` that it does not know."""
    source = source_folder("mixtral", tmp_path / "source")
    write_quantized(source, tmp_path, tmp_path / "out", scheme_of("w4a4"), SIMULATED)
    with pytest.raises(ValueError, match=r"'moe_simulated', .* use moe\.quant\.load\.load_simulated"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_refusals(tmp_path: Path) -> None:
    source = source_folder("mixtral", tmp_path / "source")
    with pytest.raises(ValueError, match=r"--to 'mixtral' .*no server runs it; use --to moe"):
        HELD.check(target_of(source, scheme_of("w4a4"), "mixtral"))
    with pytest.raises(ValueError, match="is not quantised"):
        load_simulated(source.path)
