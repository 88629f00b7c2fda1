"""Upcycled models as stock architectures: transformers alone computes what the dense model does, or the property is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from convert.upcycle.sources import load, logits, save_dense, tokens

from moe.convert.upcycle import UpcycleOptions
from moe.convert.upcycle.run import upcycle

GROUPS = {"method": "virtual-group", "num_experts": 8, "top_k": 4, "granularity": 4}
WITH_SHARED = GROUPS | {"num_experts": 6, "top_k": 3, "num_shared": 1, "score": "sigmoid"}


@pytest.mark.parametrize(
    ("kind", "to", "options"),
    [
        ("llama", "mixtral", GROUPS),
        ("mistral", "mixtral", {"method": "drop", "ratio": 0.0}),
        ("qwen2", "qwen2_moe", {}),
        ("qwen3", "qwen3_moe", {"layers": "1-"}),
        ("llama", "glm4_moe", WITH_SHARED),
        ("qwen2", "glm4_moe", {"score": "sigmoid"}),
    ],
)
def test_logits_of_transformers_own_class(kind: str, to: str, options: dict, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", kind)
    done = upcycle([source], tmp_path / "moe", UpcycleOptions(**({"num_experts": 4} | options)), to=to, verify=False)
    assert done.is_exact
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["model_type"] == to
    model, ids = load(tmp_path / "moe"), tokens(2, 40)
    assert type(model).__module__.startswith("transformers.")
    assert (logits(model, ids) - logits(load(source), ids)).abs().max() < 1e-5
    assert f"stored as {to}" in (tmp_path / "moe" / "README.md").read_text()


@pytest.mark.slow  # verification starts a process with transformers alone for each of the two models
def test_verification_without_us(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    done = upcycle([source], tmp_path / "moe", UpcycleOptions(num_experts=4), to="mixtral")
    assert done.comparison is not None
    assert done.comparison.max_diff < 1e-5


def test_what_a_format_cannot_express_is_named_before_anything_is_written(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")

    def refused(**options: object) -> str:
        with pytest.raises(ValueError) as caught:
            upcycle([source], tmp_path / "moe", UpcycleOptions(**({"num_experts": 4} | options)), to="mixtral")
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]
        return str(caught.value)

    shared = {"method": "virtual-group", "granularity": 3, "num_shared": 1}
    for options in (shared, {"renormalize": False}, {"layers": "0-1"}):
        assert "the model does not fit mixtral: " in refused(**options)


@pytest.mark.parametrize(
    ("to", "options", "advice"),
    [
        ("glm4_moe", {}, "its router takes the sigmoid; pass --score sigmoid"),
        ("mixtral", {"score": "sigmoid"}, "its router has no bias; pass --score softmax"),
        ("mixtral", {"score": "sigmoid", "layers": "0-1"}, "; pass --score softmax"),  # and has another problem
        ("mixtral", {"layers": "0-1"}, None),
        ("mixtrall", {}, None),
    ],
)
def test_the_score_that_a_format_takes_is_told(
    to: str, options: dict[str, Any], advice: str | None, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "dense")
    with pytest.raises(ValueError) as caught:
        upcycle([source], tmp_path / "moe", UpcycleOptions(**({"num_experts": 4} | options)), to=to)
    assert ("--score" in str(caught.value)) == (advice is not None)
    assert advice is None or str(caught.value).endswith(advice)
