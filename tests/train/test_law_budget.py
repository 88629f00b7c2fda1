"""`moe plan --budget`: the recipe it writes is one, its model has the parameters, and notes say what is not the paper's."""

from pathlib import Path

import pytest
import yaml

from moe.scaling.laws import LAWS
from moe.scaling.laws.joint import learning_rate
from moe.scaling.laws.optimum import Limits
from moe.train.budget import SETTINGS, BudgetPlan, as_json, plan_budget, write_config
from moe.train.config import load_config
from moe.train.law_runs import law_counts
from moe.train.plan import model_shape

NO_LIMITS = Limits()


@pytest.mark.parametrize(
    ("law", "flops", "limits"),
    [
        ("joint", 3e17, NO_LIMITS),
        ("joint", 1e20, NO_LIMITS),
        ("joint", 1e20, Limits(max_experts=1)),
        ("joint", 1e21, Limits(max_total=3e9)),
        ("joint", 5e19, Limits(active=300e6, max_experts=8)),
        ("fine-grained", 1e19, NO_LIMITS),
        ("fine-grained-16", 1e20, Limits(max_experts=128)),
        ("fine-grained-dense", 1e19, NO_LIMITS),
    ],
)
def test_the_written_recipe_builds_the_model_of_the_law(law: str, flops: float, limits: Limits, tmp_path: Path) -> None:
    plan = plan_budget(LAWS[law], flops, limits)
    write_config(plan, tmp_path / "recipe.yaml")
    config = load_config(tmp_path / "recipe.yaml")
    assert config == plan.config
    counts, wanted = law_counts(model_shape(config).build()), plan.optima[0].size
    keys = ("active", "total") if law == "joint" else ("active_blocks", "total_blocks")
    for key in keys:
        assert counts[key] == pytest.approx(getattr(wanted, key), rel=0.05)
        assert counts[key] == pytest.approx(getattr(plan.shape.size, key), rel=2e-3)  # norms, and the padded vocabulary
    if limits.max_total is not None:
        assert counts["total"] - counts["routing"] < limits.max_total * 1.002
    tokens = config.train.steps * config.train.batch_size * config.data.seq_len
    assert tokens == plan.tokens
    assert LAWS[law].training_flops(plan.shape.size, tokens) == pytest.approx(flops, rel=0.01)
    assert plan.loss == pytest.approx(plan.optima[0].loss, abs=0.005)
    assert config.optim.lr == pytest.approx(learning_rate(counts["active"], wanted.expansion), rel=0.01)
    assert config.optim.warmup_steps <= config.train.steps // 4


def test_settings_are_the_papers() -> None:
    joint = plan_budget(LAWS["joint"], 1e20, NO_LIMITS).config
    assert joint.train.batch_size * joint.data.seq_len == 2**18 and joint.data.seq_len == 512
    assert joint.optim.warmup_steps * 2**18 == pytest.approx(130e6, rel=2e-3)
    assert joint.moe is not None and joint.moe["router"]["name"] == "switch" and joint.moe["capacity_factor"] == 1.0
    assert joint.optim.clip == 0.1 and joint.optim.schedule == "wsd"
    fine = plan_budget(LAWS["fine-grained"], 1e20, NO_LIMITS).config
    assert fine.train.batch_size * fine.data.seq_len == 2**19 and fine.optim.schedule == "cosine"
    assert fine.moe is not None and fine.moe["num_experts"] == 1024 and fine.moe["router"]["top_k"] == 16
    assert plan_budget(LAWS["joint"], 1e20, Limits(max_experts=1)).config.moe is None


@pytest.mark.parametrize(("tokens", "batch"), [(0.4e9, 2**16), (0.7e9, 2**17), (2e9, 2**18), (1e12, 2**18)])
def test_the_batch_is_where_the_papers_ramp_ends(tokens: float, batch: int) -> None:
    assert SETTINGS["joint"].batch_tokens(tokens) == batch


def test_every_law_has_a_setting() -> None:
    assert SETTINGS.keys() == {*LAWS, "own"}


def test_extrapolation_and_sources_are_in_the_recipe_and_the_json(tmp_path: Path) -> None:
    plan: BudgetPlan = plan_budget(LAWS["fine-grained"], 1e22, NO_LIMITS)
    write_config(plan, tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert (
        "# Extrapolated: active parameters without embeddings" in text and "times the largest fitted (8.49e+07)" in text
    )
    assert "# Batch: the paper's setting" in text and "no rule" in text
    assert yaml.safe_load(text)["name"] == "fine-grained-1e22"
    found = as_json(plan)
    assert found["extrapolations"] and found["optima"][0]["loss"] < found["optima"][-1]["loss"]
    assert found["chosen"]["num_experts"] == found["chosen"]["granularity"] * 64
    assert plan_budget(LAWS["joint"], 2e19, Limits(max_experts=8)).extrapolations == ()


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"raise --budget|less than two batches"):
        plan_budget(LAWS["fine-grained-dense"], 1e12, NO_LIMITS)
