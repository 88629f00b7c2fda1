"""The walk: layer by layer a model computes what it computes as a whole, and inputs are those of the whole model."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models.stock.stock_cases import STOCK, logits, make_stock
from models.tiny import layers_of, make_model, tokens
from torch import Tensor

from moe.models.compare import load_folder
from moe.models.folder import ModelFolder
from moe.models.stock.reformat import reformat
from moe.models.stock.write import write_model
from moe.quant.layer import linears
from moe.quant.walk import QuantWalk, joined

WINDOWS = tokens(5, 17)


@pytest.mark.parametrize("name", STOCK)
def test_layer_by_layer_is_transformers_model(name: str, tmp_path: Path) -> None:
    """Logits of transformers' own implementation, and inputs that hooks see in our whole model."""
    stock = make_stock(name, tmp_path / "stock")
    source = ModelFolder(tmp_path / "stock")
    write_model(reformat(source), tmp_path / "ours", "moe")
    ours = load_folder(tmp_path / "ours", torch.float32)
    seen: dict[str, Tensor] = {}
    for index, layer in enumerate(ours.model.layers):
        for linear_name, linear in linears(layer).items():
            linear.register_forward_pre_hook(
                lambda _, args, key=f"{index}.{linear_name}": seen.__setitem__(key, args[0].flatten(0, -2))
            )
        layer.mlp.register_forward_pre_hook(
            lambda _, args, key=f"{index}": seen.__setitem__(key, args[0].flatten(0, -2))
        )
    logits(ours, WINDOWS)

    walk = QuantWalk(source, batch_size=2)
    hidden_BLD = walk.embed(WINDOWS)
    for layer in range(walk.num_layers):
        module = walk.load(layer, walk.stored(layer))
        found = walk.run(layer, hidden_BLD, WINDOWS, note_linear=True, note_ffn=True)
        assert found.linear.keys() == linears(module).keys()
        for linear_name, x_TQ in found.linear.items():
            torch.testing.assert_close(x_TQ, seen[f"{layer}.{linear_name}"], atol=1e-4, rtol=1e-4)
        if found.ffn_TD is not None:
            torch.testing.assert_close(found.ffn_TD, seen[f"{layer}"], atol=1e-4, rtol=1e-4)
        hidden_BLD = found.after_BLD
        walk.unload(layer)
    with torch.no_grad():
        got = stock.lm_head(stock.model.norm(hidden_BLD))
    expected = logits(stock, WINDOWS)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_shared_inputs_are_noted_once(tmp_path: Path) -> None:
    make_stock("glm4_moe-whole", tmp_path)
    walk = QuantWalk(ModelFolder(tmp_path), batch_size=2)
    walk.load(0, walk.stored(0))
    found = walk.run(0, walk.embed(WINDOWS), WINDOWS, note_linear=True, note_ffn=True)
    linear = found.linear
    assert linear["self_attn.q_proj"] is linear["self_attn.k_proj"] is linear["self_attn.v_proj"]
    assert linear["mlp.shared_experts.gate_up_proj"] is found.ffn_TD
    assert linear["self_attn.o_proj"] is not linear["self_attn.q_proj"]
    plain = walk.run(0, walk.embed(WINDOWS), WINDOWS)
    assert not plain.linear
    assert torch.equal(plain.after_BLD, found.after_BLD)


def test_one_layer_is_in_memory(tmp_path: Path) -> None:
    """The others have no weights, and a layer that is left is gone, whatever was noted in it."""
    make_stock("glm4_moe", tmp_path)
    walk = QuantWalk(ModelFolder(tmp_path))
    hidden_BLD = walk.embed(WINDOWS)
    for layer in range(walk.num_layers):
        module = walk.load(layer, walk.stored(layer))
        for other in range(walk.num_layers):
            assert all(p.is_meta == (other != layer) for p in walk.empty(other).parameters())
        walk.run(layer, hidden_BLD, WINDOWS, note_linear=True, note_ffn=True)
        weights = weakref.ref(next(module.parameters()))
        del module
        walk.unload(layer)
        gc.collect()
        assert weights() is None


def test_routing_is_that_of_the_layer(tmp_path: Path) -> None:
    """Assignments of all batches with token numbers of the whole text, whatever the batch size."""
    make_stock("glm4_moe-whole", tmp_path)
    parts = {}
    for batch_size in (1, 5):
        walk = QuantWalk(ModelFolder(tmp_path), batch_size=batch_size)
        module: Any = walk.load(0, walk.stored(0))
        found = walk.run(0, walk.embed(WINDOWS), WINDOWS, note_ffn=True)
        assert found.ffn_TD is not None
        with torch.no_grad():
            expected = module.mlp.router(found.ffn_TD)
        routed = found.routed
        assert routed is not None
        assert torch.equal(routed.token_ids_N, expected.token_ids_N)
        assert torch.equal(routed.expert_ids_N, expected.expert_ids_N)
        torch.testing.assert_close(routed.weights_N, expected.weights_N)
        torch.testing.assert_close(routed.scores_TE, expected.probs_TE)
        assert torch.equal(routed.counts_E, expected.counts_E)
        assert routed.num_tokens == 85
        parts[batch_size] = routed
    both = joined((parts[1], parts[5]))
    assert both.num_tokens == 170
    assert torch.equal(both.chosen_TE(), torch.cat((parts[1].chosen_TE(), parts[5].chosen_TE())))


def test_a_router_by_token_ids_gets_them(tmp_path: Path) -> None:
    model = make_model(router={"name": "hash"}).eval()
    model.save_pretrained(tmp_path)
    seen: list[Tensor] = []
    layers_of(model)[0].router.register_forward_hook(lambda _, args, out: seen.append(out.expert_ids_N))
    logits(model, WINDOWS)
    walk = QuantWalk(ModelFolder(tmp_path), batch_size=2)
    walk.load(0, walk.stored(0))
    found = walk.run(0, walk.embed(WINDOWS), WINDOWS)
    assert found.routed is not None
    assert found.routed.scores_TE is None
    assert torch.equal(found.routed.expert_ids_N, seen[0])


def test_refusals(tmp_path: Path) -> None:
    make_model(router={"name": "mixture_of_tokens"}).save_pretrained(tmp_path / "soft")
    walk = QuantWalk(ModelFolder(tmp_path / "soft"))
    walk.load(0, walk.stored(0))
    with pytest.raises(ValueError, match="mixes tokens into slots"):
        walk.run(0, walk.embed(WINDOWS), WINDOWS)

    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[1, 0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    walk = QuantWalk(ModelFolder(tmp_path / "nan"))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts.down_proj has values that are not finite"):
        walk.stored(0)
