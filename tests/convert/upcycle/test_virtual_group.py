"""Virtual groups: exact for every granularity, because a token's experts hold every routed shard equally often."""

from pathlib import Path

import pytest
import torch
from convert.upcycle.ffns import make_ffn
from convert.upcycle.sources import DIM, WIDTH, convert, greedy, load, logits, save_dense, tokens
from torch.nn import functional as F

from moe.convert.dense import read_ffn
from moe.convert.upcycle import UPCYCLERS, UpcycleOptions
from moe.convert.upcycle.weights import layer_weights
from moe.layer import moe_layers
from moe.models.folder import ModelFolder

METHOD = UPCYCLERS["virtual-group"]
# E experts, K per token, G shards, S of them shared
SHAPES = [
    (8, 4, 4, 0),
    (8, 8, 4, 0),
    (12, 3, 3, 0),
    (16, 6, 2, 0),
    (6, 3, 4, 1),
    (8, 4, 6, 2),
    (4, 2, 4, 3),
    (4, 4, 4, 0),
]


@pytest.mark.parametrize(("num_experts", "top_k", "granularity", "num_shared"), SHAPES)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_of_the_saved_model(
    kind: str, num_experts: int, top_k: int, granularity: int, num_shared: int, tmp_path: Path
) -> None:
    source, ids = save_dense(tmp_path / "dense", kind), tokens(2, 40)
    done = convert(
        source,
        tmp_path / "moe",
        method="virtual-group",
        num_experts=num_experts,
        top_k=top_k,
        granularity=granularity,
        num_shared=num_shared,
    )
    assert done.is_exact
    model = load(tmp_path / "moe")
    layer = next(iter(moe_layers(model).values()))
    assert layer.experts.down_proj.shape == (num_experts, DIM, WIDTH // granularity)
    assert (logits(model, ids) - logits(load(source), ids)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_text(kind: str, tmp_path: Path) -> None:
    source, ids = save_dense(tmp_path / "dense", kind), tokens(1, 6)
    convert(source, tmp_path / "moe", method="virtual-group", num_experts=8, top_k=4, granularity=4)
    assert greedy(load(tmp_path / "moe"), ids) == greedy(load(source), ids)


@pytest.mark.parametrize("num_shared", [0, 1])
def test_weights_against_slices_of_the_dense_ffn(num_shared: int, tmp_path: Path) -> None:
    """Expert j holds routed shard j mod g, times g; rows of the gate are equal in runs of g."""
    granularity, group = 4, 4 - num_shared
    folder = ModelFolder(save_dense(tmp_path / "dense"))
    options = UpcycleOptions(
        num_experts=2 * group, top_k=group, method="virtual-group", granularity=granularity, num_shared=num_shared
    )
    weights, ffn, part = layer_weights([folder], 0, options), read_ffn(folder, 0), WIDTH // granularity
    assert ffn.gate_FD is not None
    for expert in range(2 * group):
        start = (num_shared + expert % group) * part
        gate_up = torch.cat((ffn.gate_FD[start : start + part], ffn.up_FD[start : start + part]))
        assert torch.equal(weights.gate_up_EHD[expert], gate_up)
        assert torch.equal(weights.down_EDF[expert], ffn.down_DF[:, start : start + part] * group)
    rows = weights.router["weight"]
    assert all(torch.equal(rows[expert], rows[expert // group * group]) for expert in range(2 * group))
    assert not torch.equal(rows[0], rows[group])
    if num_shared:
        assert weights.shared_gate_up_HD is not None
        assert weights.shared_down_DF is not None
        assert torch.equal(weights.shared_gate_up_HD, torch.cat((ffn.gate_FD[:part], ffn.up_FD[:part])))
        assert torch.equal(weights.shared_down_DF, ffn.down_DF[:, :part])
    else:
        assert weights.shared_gate_up_HD is None


def test_cube_root_scaling_is_not_exact_for_swiglu() -> None:
    """Why the factor is on the down-projection alone: spread over all three matrices it is wrong by a fifth."""
    ffn, x_TD = make_ffn(), torch.randn(64, 24)
    assert ffn.gate_FD is not None

    def swiglu(gate_factor: float, up_factor: float, down_factor: float) -> torch.Tensor:
        hidden = F.silu(x_TD @ ffn.gate_FD.T * gate_factor) * (x_TD @ ffn.up_FD.T * up_factor)  # type: ignore[union-attr]
        return hidden @ ffn.down_DF.T * down_factor

    exact, root = swiglu(1, 1, 1) * 8, 8 ** (1 / 3)
    assert (swiglu(1, 1, 8) - exact).norm() < 1e-6 * exact.norm()
    assert (swiglu(root, root, root) - exact).norm() > 0.05 * exact.norm()


def test_a_token_gets_whole_groups(tmp_path: Path) -> None:
    """In bf16 too, because `MoELayer` computes its gate in fp32: no token gets a shard twice or not at all."""
    source = save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    convert(source, tmp_path / "moe", method="virtual-group", num_experts=16, top_k=4, granularity=4)
    layer = next(iter(moe_layers(load(tmp_path / "moe").bfloat16()).values()))
    with torch.no_grad():
        routing = layer.router(torch.randn(4000, DIM, dtype=torch.bfloat16))
    ids_TK = routing.expert_ids_N.view(4000, 4)
    assert (ids_TK // 4 == ids_TK[:, :1] // 4).all()
    assert (ids_TK.sort(1).values % 4 == torch.arange(4)).all()
    assert len((ids_TK[:, 0] // 4).unique()) == 4


@pytest.mark.parametrize(("granularity", "is_exact"), [(4, True), (3, False)])
def test_bf16_is_exact_for_powers_of_two(granularity: int, is_exact: bool, tmp_path: Path) -> None:
    """A factor of 3 rounds the down-projection; verification, in fp32, sees that and says it instead of failing."""
    source = save_dense(tmp_path / "dense", dtype=torch.bfloat16)
    options = {"method": "virtual-group", "num_experts": 2 * granularity, "top_k": granularity}
    done = convert(source, tmp_path / "moe", granularity=granularity, **options)
    assert done.comparison is not None
    assert done.is_exact == is_exact == (done.comparison.max_diff < 1e-5)


def test_seven_eighths_would_be_missed_without_the_factor(tmp_path: Path) -> None:
    """Verification refuses a result that differs, and leaves nothing."""
    source = save_dense(tmp_path / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe.convert.upcycle.virtual_group.group_size", lambda options: 2)
        with pytest.raises(RuntimeError, match="keeps the model's function, but logits differ"):
            convert(source, tmp_path / "moe", method="virtual-group", num_experts=8, top_k=4, granularity=4)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": 5}, "--granularity 5 does not divide the FFN width 48; use one of"),
        ({"granularity": 1}, "needs --granularity of at least 2"),
        ({"granularity": 4, "num_shared": 4}, "--shared 4 must be below --granularity 4"),
        ({"granularity": 4, "num_experts": 6}, "--experts 6 is not a multiple of the 4 routed shards"),
        ({"granularity": 4, "top_k": 2}, "--top-k 2 is not a multiple of the 4 routed shards"),
        ({"granularity": 4, "num_shared": 1}, "--experts 8 is not a multiple of the 3 routed shards"),
        ({"granularity": 4, "router_std": 0.0}, "--router-std 0 makes all groups tie"),
        ({"granularity": 4, "ratio": 0.3}, "--ratio 0.3 with --method virtual-group"),
    ],
)
def test_what_does_not_fit_is_named(options: dict, message: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        convert(source, tmp_path / "moe", **({"method": "virtual-group", "num_experts": 8, "top_k": 4} | options))
    assert not (tmp_path / "moe").exists()
