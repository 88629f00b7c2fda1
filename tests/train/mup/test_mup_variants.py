"""Variants of a recipe: what changes along each axis, what stays, and errors that name the setting."""

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import write_recipe

from moe.train.config import RunConfig, load_config
from moe.train.mup.variants import AXES, EXAMPLES, OPTIONS, variant

MUP = "parametrization={name: mup, base: {hidden_size: 32, intermediate_size: 64, num_attention_heads: 2}}"

FOUR_HEADS = ["model.decoder.num_attention_heads=4", "model.decoder.num_key_value_heads=2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("variants"))


def changed(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """Settings that differ, by dotted name."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    old, new = flat(before.model_dump()), flat(after.model_dump())
    return {key: new.get(key) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}


def test_every_axis_has_an_option_and_an_example() -> None:
    assert AXES.keys() == OPTIONS.keys() == EXAMPLES.keys()


def test_width_changes_every_width_in_proportion(recipe: Path) -> None:
    config = load_config(recipe, [MUP, "moe.expert_hidden=24", "model.decoder.num_key_value_heads=2"])
    found = variant(config, "width", 128)
    assert changed(config, found) == {
        "model.decoder.hidden_size": 128,
        "model.decoder.intermediate_size": 256,
        "model.decoder.num_attention_heads": 8,
        "model.decoder.num_key_value_heads": 8,
        "moe.expert_hidden": 96,
    }
    assert variant(config, "width", 32) == config, "the base stays what it is"


def test_width_of_a_decoder_that_does_not_say_its_key_value_heads(recipe: Path) -> None:
    config = load_config(recipe, ["model.decoder.num_key_value_heads=null"])
    assert variant(config, "width", 64).model.decoder["num_key_value_heads"] == 4


def test_experts_changes_their_number_alone(recipe: Path) -> None:
    config = load_config(recipe, [MUP])
    assert changed(config, variant(config, "experts", 16)) == {"moe.num_experts": 16}


def test_granularity_splits_experts_and_makes_the_recipes_the_base(recipe: Path) -> None:
    config = load_config(recipe, [MUP, "moe.granularity=2"])
    found = variant(config, "granularity", 8)
    assert changed(config, found) == {
        "moe.granularity": 8,
        "moe.num_experts": 16,
        "moe.router.top_k": 8,
        "parametrization.base.granularity": 2,
    }
    given = load_config(recipe, [MUP, "moe.granularity=2", "parametrization.base.granularity=1"])
    assert variant(given, "granularity", 4).parametrization.base["granularity"] == 1  # type: ignore[index]
    standard = load_config(recipe)
    assert "parametrization.base" not in changed(standard, variant(standard, "granularity", 2))


@pytest.mark.parametrize(
    ("axis", "value", "settings", "message"),
    [
        ("width", 40, FOUR_HEADS, r"at width 40 there are 5 heads for 2 key-value heads; choose widths that are multi"),
        ("width", 33, [], r"model.decoder.num_attention_heads=2 of width 32 is no whole number at width 33"),
        ("width", 64, ["model.decoder={model_type: llama}"], r"model.decoder.hidden_size is not set"),
        ("width", 48, ["moe.expert_hidden=9"], r"moe.expert_hidden=9 of width 32 is no whole number at width 48"),
        ("experts", 8, ["moe=null"], r"moe is null: a dense recipe has no experts to vary"),
        ("granularity", 2, ["moe=null"], r"moe is null: a dense recipe has no experts to vary"),
        ("experts", 1, [], r"^router.top_k=2 is more than num_experts=1; lower it or add experts$"),
        ("granularity", 2, ["moe.expert_hidden=8"], r"moe.expert_hidden fixes the experts' width; set moe.granularity"),
        ("granularity", 3, ["moe.granularity=2", "moe.num_experts=5"], r"makes 7.5 of num_experts; choose a multiple"),
        ("granularity", 2, ["moe.router={name: switch}"], r"moe.router.top_k is not set"),
        ("width", 64, ["model.init_from=somewhere"], r"model.init_from=somewhere is a model of one shape.*remove it"),
        ("experts", 8, ["model.init_from=somewhere"], r"model.init_from=somewhere is a model of one shape"),
    ],
)
def test_what_cannot_be_varied(recipe: Path, axis: str, value: int, settings: list[str], message: str) -> None:
    settings = ["parallel.ep_size=1", "parallel.processes=1", *settings]
    with pytest.raises(ValueError, match=message):
        variant(load_config(recipe, settings), axis, value)
