"""`moe upcycle`: what it prints and leaves, and what users are told when they err."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.upcycle.sources import load, logits, save_dense, tokens
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from moe.cli import app
from moe.convert.upcycle import UpcycleOptions, run
from moe.models import MoEConfig, MoEForCausalLM
from moe.models.folder import ModelFolder

TEXT = "the cat sat on the mat, and the dog sat on the cat; naïve 猫\n" * 12


def moe_upcycle(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["upcycle", *map(str, arguments)])


def add_tokenizer(folder: Path) -> None:
    """A byte-level one, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_dense(tmp_path_factory.mktemp("command") / "dense", vocab_size=300)
    add_tokenizer(folder)
    return folder


def test_json_is_all_of_stdout_and_the_folder_is_complete(source: Path, tmp_path: Path) -> None:
    done = moe_upcycle(source, tmp_path / "moe", "--experts", 4, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["model"] == str(tmp_path / "moe")
    assert found["exact"] is True
    assert found["comparison"]["max_diff"] < 1e-5
    assert found["comparison"]["tokens"] > 100  # of the text, by the tokenizer
    carried = {path.name for path in source.iterdir()} - {"model.safetensors", "config.json"}
    assert "chat_template.jinja" in carried
    for name in carried:
        assert (tmp_path / "moe" / name).read_bytes() == (source / name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"moe"}


def test_for_people_and_the_card(source: Path, tmp_path: Path) -> None:
    done = moe_upcycle(
        source, tmp_path / "moe", "--experts", 4, "--method", "drop", "--ratio", 0.25, "--layers", "1-", "--seed", 3
    )
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "logits differ from" in done.stderr
    assert "train it further" in done.stderr
    text = (tmp_path / "moe" / "README.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("moe upcycle"))
    for part in (
        "--experts 4",
        "--method drop",
        "--ratio 0.25",
        "--layers 1-",
        "--seed 3",
        "--indices shared",
        "--to moe",
    ):
        assert part in command
    assert "--granularity" not in command
    again = tmp_path / "again"
    words = command.split()[2:]
    assert moe_upcycle(words[0], again, *words[2:]).exit_code == 0
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "moe" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32), ("keep", torch.float16)]
)
def test_dtype(flag: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """All tensors, the config, and what `dtype="auto"` loads."""
    source = save_dense(tmp_path / "dense", dtype=torch.float16)
    done = moe_upcycle(source, tmp_path / "moe", "--experts", 4, "--dtype", flag, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["exact"] is (flag != "bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "moe" / "model.safetensors").values()} == {dtype}
    model = MoEForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if flag == "fp32":
        assert (logits(load(tmp_path / "moe"), tokens(1, 20)) - logits(load(source), tokens(1, 20))).abs().max() < 1e-5


def test_btx_and_no_verify(tmp_path: Path) -> None:
    first, second = (save_dense(tmp_path / str(seed), seed=seed) for seed in range(2))
    arguments = ["--experts", 2, "--method", "btx", "--also", second, "--no-verify", "--json"]
    done = moe_upcycle(first, tmp_path / "moe", *arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["comparison"] is None
    text = (tmp_path / "moe" / "README.md").read_text()
    assert "Not measured (`--no-verify`)" in text
    assert f"--also {second}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", 1], "--experts 1 must be at least 2"),
        (["--experts", 4, "--top-k", 5], "--top-k 5 must lie between 1 and --experts 4"),
        (["--experts", 4, "--top-k", 1], "gives the gate no gradient; use --top-k 2, or add --no-renormalize"),
        (["--experts", 4, "--method", "drp"], "--method 'drp' is unknown; did you mean 'drop'?"),
        (["--experts", 4, "--method", "drop", "--ratio", 1.5], "--ratio 1.5 must lie in [0, 1]"),
        (
            ["--experts", 4, "--method", "drop", "--indices", "own"],
            "--indices 'own' is unknown; use one of shared, independent",
        ),
        (["--experts", 4, "--ratio", 0.3], "--ratio 0.3 with --method copy"),
        (["--experts", 4, "--shared", 1], "a shared copy beside routed copies would add the FFN twice"),
        (["--experts", 4, "--granularity", 2], "--method virtual-group cuts it into shards"),
        (["--experts", 4, "--layers", "2-9"], "is not within layers 0 to 2"),
        (["--experts", 4, "--dtype", "int8"], "--dtype 'int8' is unknown; use one of keep, fp32, bf16"),
        (["--experts", 4, "--router-std", -1], "--router-std -1.0 must not be negative"),
        (["--experts", 4, "--to", "gpt"], "--to 'gpt' is unknown"),
    ],
)
def test_mistakes(arguments: list, message: str, source: Path, tmp_path: Path) -> None:
    done = moe_upcycle(source, tmp_path / "moe", *arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    assert message in done.stderr.replace("\n", " ")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_or_there_already(source: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        done = moe_upcycle(*arguments, "--experts", 4)
        assert done.exit_code == 2, (done.output, done.exception)
        return done.stderr.replace("\n", " ")

    assert "has no config.json" in refused(tmp_path / "none", tmp_path / "moe")
    (tmp_path / "taken").mkdir()
    assert "taken exists; remove it or choose another folder" in refused(source, tmp_path / "taken")
    experts = tmp_path / "experts"
    MoEForCausalLM(MoEConfig(text_config=ModelFolder(source).config, moe={"num_experts": 2})).save_pretrained(experts)
    assert "is a Mixture-of-Experts already; give a dense decoder" in refused(experts, tmp_path / "moe")


def test_a_damaged_shard_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    path = source / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    done = moe_upcycle(source, tmp_path / "moe", "--experts", 4)
    assert done.exit_code == 2, (done.output, done.exception)
    assert str(path) in done.stderr.replace("\n", "")
    assert [found.name for found in tmp_path.iterdir()] == ["dense"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = save_dense(tmp_path / "dense"), run.layer_weights

    def broken(folders: Any, layer: int, options: UpcycleOptions) -> Any:
        if layer == 2:
            raise KeyboardInterrupt
        return real(folders, layer, options)

    monkeypatch.setattr(run, "layer_weights", broken)
    with pytest.raises(KeyboardInterrupt):
        run.upcycle([source], tmp_path / "moe", UpcycleOptions(num_experts=4))
    assert [found.name for found in tmp_path.iterdir()] == ["dense"]


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = save_dense(tmp_path / "dense")
    options = UpcycleOptions(num_experts=4)
    run.upcycle([source], tmp_path / "moe", options, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
