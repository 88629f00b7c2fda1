"""The config of a run: every wrong key and value is named, with the nearest valid key; what is written loads again."""

from pathlib import Path

import pytest
import yaml
from helpers.runs import write_recipe

from moe.train.config import RunConfig, load_config, parse_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("config"))


def message(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(recipe, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("trian.steps=3", "trian", "'train'"),
        ("train.stps=3", "train.stps", "'steps'"),
        ("data.tokenizer.vocab_sise=400", "data.tokenizer.vocab_sise", "'vocab_size'"),
        ("moe.num_expert=3", "moe.num_expert", "'num_experts'"),
        ("moe.balance.z_coeff=1", "moe.balance.z_coeff", "'z_coef'"),
        ("moe.router.topk=1", "router.topk", "'top_k'"),
        ("moe.router.name=topkk", "router.name='topkk'", "'topk'"),
        ("model.init_form=x", "model.init_form", "'init_from'"),
        ("model.decoder.hidden_sze=3", "model.decoder.hidden_sze", "'hidden_size'"),
        ("model.decoder.model_type=lama", "model.decoder.model_type='lama'", "llama"),
        ("train..steps=3", "train.", "steps"),
    ],
)
def test_unknown_names_come_with_the_nearest_known_one(recipe: Path, override: str, key: str, hint: str) -> None:
    text = message(recipe, override)
    assert key in text
    assert hint in text.split(key, 1)[1]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=two", "train.steps", "'two'"),
        ("train.steps=1.5", "train.steps", "1.5"),
        ("train.steps=0", "train.steps", "0"),
        ("train=3", "train", "3"),
        ("optim.betas=[0.9, x]", "optim.betas.1", "'x'"),
        ("optim.lr=0", "optim.lr", "0"),
        ("parallel.zero_stage=4", "parallel.zero_stage", "4"),
        ("parallel.processes=two", "parallel.processes", "'two'"),
        ("parallel.processes=0", "parallel.processes", "0"),
        ("log.wandb=maybe", "log.wandb", "'maybe'"),
        ("name=../elsewhere", "name", "'../elsewhere'"),
        ("moe=3", "moe", "3"),
        ("moe.num_experts=many", "moe.num_experts", "'many'"),
        ("moe.router=3", "moe.router", "3"),
        ("moe.router.top_k=two", "moe.router.top_k", "'two'"),
        ("moe.balance=3", "moe.balance", "3"),
        ("moe.balance.aux_coef=much", "moe.balance.aux_coef", "'much'"),
        ("moe.activation=relu", "moe.activation", "'relu'"),
    ],
)
def test_wrong_values_are_named(recipe: Path, override: str, key: str, value: str) -> None:
    assert f"{key}={value}" in message(recipe, override)


def test_a_wrong_decoder_value_is_named(recipe: Path) -> None:
    text = message(recipe, "model.decoder.hidden_size=wide")
    assert "model.decoder" in text and "'hidden_size'" in text and "'wide'" in text
    assert "multiple of the number of attention heads" in message(recipe, "model.decoder.hidden_size=33")


def test_all_problems_are_listed_at_once(recipe: Path) -> None:
    text = message(recipe, "train.stps=3", "optim.lr=fast")
    assert "train.stps" in text and "optim.lr='fast'" in text


def test_overrides_are_nested_and_typed_as_yaml(recipe: Path) -> None:
    overrides = [
        "train.steps=7",
        "optim.lr=2e-3",
        "optim.betas=[0.8, 0.9]",
        "train.activation_checkpointing=true",
        "data.tokenizer.vocab_size=512",
        "model.decoder.hidden_size=64",
        "moe.router={name: switch}",
        "moe.balance.z_coef=1e-3",
        "parallel.deepspeed.zero_optimization.overlap_comm=false",
        "name=seven",
        "log.wandb=off",
    ]
    config = load_config(recipe, overrides)
    assert config.train.steps == 7
    assert config.optim.lr == 2e-3
    assert config.optim.betas == (0.8, 0.9)
    assert config.train.activation_checkpointing is True
    assert config.data.tokenizer.vocab_size == 512
    assert config.model.decoder["hidden_size"] == 64
    assert config.model.decoder["num_hidden_layers"] == 2, "the rest of the section stays"
    assert config.moe is not None
    assert config.moe["router"] == {"name": "switch"}
    assert config.moe["balance"]["z_coef"] == 1e-3, "YAML reads 1e-3 as text"
    assert config.parallel.deepspeed == {"zero_optimization": {"overlap_comm": False}}
    assert config.name == "seven" and config.run_dir.name == "seven"
    assert config.log.wandb == "off", "YAML reads off as false"


def test_null_removes_the_experts_and_an_override_brings_them_back(recipe: Path) -> None:
    assert load_config(recipe, ["moe=null", "parallel.ep_size=1"]).moe is None
    config = load_config(recipe, ["moe=null", "moe.num_experts=6", "moe.router.top_k=3"])
    assert config.moe is not None
    assert config.moe["num_experts"] == 6


@pytest.mark.parametrize("override", ["train.steps", "=3", "train.steps.more=3", "train.steps=[1", "train.steps={a: b"])
def test_malformed_overrides_are_shown(recipe: Path, override: str) -> None:
    assert f"override {override!r}" in message(recipe, override)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["parallel.ep_size=3", "parallel.processes=3"], ["moe.num_experts=4", "parallel.ep_size=3"]),
        (["moe.router.top_k=5"], ["router.top_k=5", "num_experts=4"]),
        (["parallel.processes=3"], ["parallel.ep_size=2", "parallel.processes=3"]),
        (["optim.warmup_steps=40"], ["optim.warmup_steps=40", "train.steps=40"]),
        (["moe=null"], ["parallel.ep_size=2", "moe is null"]),
        (["moe.balance.bias_update_rate=1e-3"], ["moe.balance.bias_update_rate=0.001", "selection_bias"]),
    ],
)
def test_settings_that_contradict_each_other(recipe: Path, overrides: list[str], parts: list[str]) -> None:
    text = message(recipe, *overrides)
    assert all(part in text for part in parts), text


def test_batch_must_divide_among_processes(recipe: Path) -> None:
    config = load_config(recipe, ["train.batch_size=24", "train.micro_batch_size=4"])
    assert config.grad_accum(2) == 3
    with pytest.raises(ValueError, match=r"train\.batch_size=24 .* train\.micro_batch_size=4 .*multiple of 16"):
        config.grad_accum(4)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml' does not exist"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping of sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("train: [1\n")
    with pytest.raises(ValueError, match="is not YAML"):
        load_config(tmp_path / "broken.yaml")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == RunConfig()


RECIPES = [p for p in sorted((ROOT / "configs").glob("**/*.yaml")) if "train" in (yaml.safe_load(p.read_text()) or {})]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    config = load_config(path)
    processes = config.parallel.processes
    config.grad_accum(processes if isinstance(processes, int) else config.parallel.ep_size)


def test_there_are_recipes() -> None:
    assert "tiny" in {path.stem for path in RECIPES}


@pytest.mark.parametrize(
    "overrides", [[], ["moe=null", "parallel.ep_size=1"], ["model.init_from=somewhere", "parallel.processes=auto"]]
)
def test_what_a_run_writes_loads_again(recipe: Path, overrides: list[str]) -> None:
    config = load_config(recipe, overrides)
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config
