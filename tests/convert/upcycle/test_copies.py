"""Sparse upcycling: the same function, whatever the gate says; experts part through the gate alone."""

from pathlib import Path

import pytest
import torch
from convert.upcycle.sources import DIM, LAYERS, WIDTH, convert, greedy, load, logits, save_dense, tokens
from safetensors.torch import load_file

from moe.convert.dense import read_ffn
from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.weights import layer_weights
from moe.layer import moe_layers
from moe.models.folder import ModelFolder


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_logits_and_greedy_text_of_the_saved_model(kind: str, top_k: int, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", kind)
    done = convert(source, tmp_path / "moe", num_experts=5, top_k=top_k)
    assert done.is_exact
    assert done.comparison is not None
    dense, experts, ids = load(source), load(tmp_path / "moe"), tokens(3, 50)
    assert (logits(experts, ids) - logits(dense, ids)).abs().max() < 1e-5
    assert done.comparison.max_diff < 1e-5
    assert greedy(experts, ids[:1, :6]) == greedy(dense, ids[:1, :6])


def test_every_expert_is_the_dense_ffn(tmp_path: Path) -> None:
    folder = ModelFolder(save_dense(tmp_path / "dense", dtype=torch.bfloat16))
    weights, ffn = layer_weights([folder], 1, UpcycleOptions(num_experts=3, router_std=0.5)), read_ffn(folder, 1)
    assert weights.gate_up_EHD.shape == (3, 2 * WIDTH, DIM)
    for expert in range(3):
        assert torch.equal(weights.gate_up_EHD[expert, :WIDTH], ffn.gate_FD)
        assert torch.equal(weights.gate_up_EHD[expert, WIDTH:], ffn.up_FD)
        assert torch.equal(weights.down_EDF[expert], ffn.down_DF)
    assert weights.shared_down_DF is None
    gate_ED = weights.router["weight"]
    assert (gate_ED.shape, gate_ED.dtype) == ((3, DIM), torch.bfloat16)
    assert 0.4 < gate_ED.float().std() < 0.6


def test_gates_follow_the_seed_and_differ_between_layers(tmp_path: Path) -> None:
    folder = ModelFolder(save_dense(tmp_path / "dense"))

    def gate(layer: int, seed: int, method: str = "copy", std: float = 0.02) -> torch.Tensor:
        options = UpcycleOptions(num_experts=64, method=method, seed=seed, router_std=std)
        return layer_weights([folder], layer, options).router["weight"]

    assert torch.equal(gate(0, 7), gate(0, 7))
    assert torch.equal(gate(0, 7), gate(0, 7, "drop"))
    assert not torch.equal(gate(0, 7), gate(0, 8))
    assert not torch.equal(gate(0, 7), gate(1, 7))
    assert gate(0, 7).std() == pytest.approx(0.02, rel=0.05)
    assert not gate(0, 7, std=0.0).any()


def test_only_the_chosen_layers_become_moes(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    done = convert(source, tmp_path / "moe", layers="0-:2")
    assert done.config.spec.only_layers == (0, 2)
    assert list(moe_layers(load(tmp_path / "moe"))) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "moe" / "model.safetensors")
    kept = {name for name in before if ".mlp." not in name or ".1." in name}
    assert kept == before.keys() & after.keys()
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert done.comparison is not None
    assert done.comparison.max_diff < 1e-5


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", tie_word_embeddings=True)
    convert(source, tmp_path / "moe")
    assert "lm_head.weight" not in load_file(tmp_path / "moe" / "model.safetensors")
    model = load(tmp_path / "moe")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sigmoid_scores_are_exact_too_and_start_without_a_bias(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    done = convert(source, tmp_path / "moe", score="sigmoid")
    assert done.is_exact
    assert done.comparison is not None
    assert done.comparison.max_diff < 1e-5
    biases = {n: t for n, t in load_file(tmp_path / "moe" / "model.safetensors").items() if n.endswith("router.bias_E")}
    assert len(biases) == LAYERS
    assert all(bias.dtype == torch.float32 and not bias.any() for bias in biases.values())
    near = convert(source, tmp_path / "near", score="sigmoid", renormalize=False, router_std=1e-5)
    assert near.comparison is not None
    assert near.comparison.max_diff < 1e-3


def test_a_gate_of_zeros_is_exact_too(tmp_path: Path) -> None:
    done = convert(save_dense(tmp_path / "dense"), tmp_path / "moe", router_std=0.0)
    assert done.comparison is not None
    assert done.comparison.max_diff < 1e-5


def test_top_1_without_renormalised_weights_is_near_and_trains_its_gate(tmp_path: Path) -> None:
    """The weight is E times the softmax: 1 but for the gate's logits, which are small."""
    source, ids = save_dense(tmp_path / "dense"), tokens(2, 30)
    done = convert(source, tmp_path / "moe", top_k=1, renormalize=False, router_std=1e-5)
    assert not done.is_exact
    assert done.comparison is not None
    assert done.comparison.max_diff < 1e-3
    far = convert(source, tmp_path / "far", top_k=1, renormalize=False, router_std=0.3)
    assert far.comparison is not None
    assert far.comparison.max_diff > 0.05
    model = load(tmp_path / "moe").train()
    model(ids, labels=ids).loss.backward()
    for layer in moe_layers(model).values():
        assert layer.router.weight.grad.abs().max() > 1e-6


def test_copies_part_through_the_gate_alone(tmp_path: Path) -> None:
    """With all experts on and equal weights, all get the same gradient forever; the random gate is what differs."""
    source, ids = save_dense(tmp_path / "dense"), tokens(4, 30)

    def spread(**options: object) -> float:
        """Largest difference of two experts' gradients relative to the largest gradient, over all layers."""
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        convert(source, folder, **options)
        model = load(folder).train()
        model(ids, labels=ids).loss.backward()
        grads = [layer.experts.gate_up_proj.grad for layer in moe_layers(model).values()]
        assert len(grads) == LAYERS
        return max(float((grad - grad[:1]).abs().max() / grad.abs().max()) for grad in grads)

    assert spread(top_k=4, router_std=0.0) < 1e-5
    assert spread(top_k=4, router_std=0.02) > 1e-3
    assert spread(top_k=2, router_std=0.02) > 0.1
