"""The coordinate check on a tiny recipe: passes under muP, fails under the standard parametrization, finds a wrong rule."""

import json
from pathlib import Path
from unittest import mock

import pytest
from helpers.runs import write_recipe

from moe.scaling.coordinates import ACTIVATION, UPDATE
from moe.scaling.mup import ROLES, Factors
from moe.train.config import RunConfig, load_config
from moe.train.mup.check import LIMIT, CheckOptions, CheckResult, run_check

WIDTHS = (64, 256)
MUP = "parametrization={name: mup, base: {hidden_size: 64, intermediate_size: 128, num_attention_heads: 4}}"
SETTINGS = ["optim.lr=0.002", "moe.balance.aux_coef=0", "model.decoder.num_hidden_layers=1"]
# A rate at which experts learn more than routers: tokens that go elsewhere are a change of the output as well, and at widths
# as small as these there are the more of them the smaller the routers' initial logits are.
MUON = ["optim.name=muon", "optim.lr=0.006", "parallel.zero_stage=0"]
UNTIED = ["model.decoder.tie_word_embeddings=false", "moe.num_shared_experts=1", "moe.shared_gate=true"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return write_recipe(tmp_path_factory.mktemp("check"), model={"decoder": decoder})


def config(recipe: Path, *settings: str) -> RunConfig:
    return load_config(recipe, [*SETTINGS, *settings])


def check(chosen: RunConfig, axis: str = "width", values: tuple[int, ...] = WIDTHS, seeds: int = 8) -> CheckResult:
    return run_check(chosen, CheckOptions(axis=axis, values=values, num_steps=2, num_seeds=seeds, num_windows=8))


def failed(result: CheckResult) -> set[str]:
    return {verdict.module for verdict in result.failed}


@pytest.mark.parametrize("settings", [[], UNTIED, [*UNTIED, *MUON]], ids=["tied", "untied", "muon"])
def test_passes_under_mup_and_fails_under_standard(recipe: Path, settings: list[str]) -> None:
    scaled = check(config(recipe, MUP, *settings))
    assert failed(scaled) == set()
    assert {verdict.step for verdict in scaled.verdicts} == {0, 1, 2}
    plain = check(config(recipe, *settings), seeds=2)
    # Outputs that are sums over the width, but not what norms and embeddings make.
    assert failed(plain) >= {"self_attn.q_proj", "self_attn.o_proj", "mlp.experts", "mlp.router", "lm_head"}
    assert "mlp.shared_experts.down_proj" in failed(plain) or UNTIED[0] not in settings


def test_a_wrong_rule_is_found_where_it_is(recipe: Path) -> None:
    """Without the rule of one role, its modules fail."""
    chosen = config(recipe, MUP, *UNTIED)
    with mock.patch.dict(ROLES, {"output": lambda r: Factors()}):
        assert failed(check(chosen, seeds=2)) >= {"mlp.router", "lm_head", "mlp.shared_experts.gate"}
    with mock.patch.dict(ROLES, {"hidden": lambda r: Factors(init=r**-0.5)}):
        assert failed(check(chosen, seeds=2)) >= {"self_attn.v_proj", "mlp.experts", "mlp.shared_experts.down_proj"}


@pytest.mark.parametrize("settings", [[], MUON], ids=["adamw", "muon"])
def test_granularity_passes_from_the_recipes_own(recipe: Path, settings: list[str]) -> None:
    result = check(config(recipe, MUP, *settings), "granularity", (1, 4))
    assert failed(result) == set()
    plain = check(config(recipe, *settings), "granularity", (1, 4), seeds=1)
    assert failed(plain) >= {"mlp", "mlp.experts"}


def test_experts_keep_sizes_at_the_start(recipe: Path) -> None:
    """Later, more experts fit the text better: what the check then says is about the text as well."""
    result = check(config(recipe, MUP), "experts", (4, 16), seeds=2)
    start = [verdict for verdict in result.verdicts if verdict.step == 0 and verdict.judged]
    assert len(start) > 8
    assert all(verdict.change < 0.1 for verdict in start)


def test_json_has_every_size(recipe: Path) -> None:
    result = check(config(recipe), seeds=1)
    found = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert (found["parametrization"], found["axis"], found["values"]) == ("standard", "width", list(WIDTHS))
    assert found["limit"] == LIMIT and found["ok"] is False
    router = [each for each in found["modules"] if each["module"] == "mlp.router"]
    assert [(each["quantity"], each["step"], each["judged"]) for each in router] == [
        (ACTIVATION, 0, False),
        (ACTIVATION, 1, False),
        (UPDATE, 1, True),
        (ACTIVATION, 2, False),
        (UPDATE, 2, True),
    ]
    assert all(set(each["sizes"]) == {"64", "256"} for each in found["modules"])


def test_a_diverged_run_fails_and_is_json(recipe: Path) -> None:
    result = run_check(
        config(recipe, "optim.lr=1e30"), CheckOptions(axis="width", values=(64, 128), num_steps=3, num_seeds=1)
    )
    assert "lm_head" in failed(result)
    json.dumps(result.as_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("axis", "values", "message"),
    [
        ("width", (64,), r"--widths 64 needs at least 2 different values, such as 128,256,512"),
        ("experts", (4, 4), r"--experts 4,4 needs at least 2 different values, such as 4,8,16"),
        ("granularity", (0, 1), r"--granularity 0 must be at least 1"),
    ],
)
def test_values_that_cannot_be(axis: str, values: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckOptions(axis=axis, values=values)
