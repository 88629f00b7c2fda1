"""The README.md of a converted model."""

from pathlib import Path

import pytest
import yaml
from convert.upcycle.sources import make_dense, save_dense

from moe.convert.model_card import ModelCard, render_card
from moe.models import MoEConfig
from moe.models.folder import ModelFolder


def card(*sources: Path, **values: object) -> str:
    folders = [ModelFolder(path) for path in sources]
    config = MoEConfig(text_config=make_dense().config, moe={"num_experts": 4, "only_layers": [0, 2]})
    fields = {"title": "out", "kind": "upcycled", "command": "moe upcycle a b", "summary": "Copies.", "to": "moe"}
    return render_card(ModelCard(sources=folders, config=config, **(fields | values)))


def header(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_what_it_says(tmp_path: Path) -> None:
    text = card(
        save_dense(tmp_path / "dense"),
        options={"ratio": 0.5},
        checks={"largest difference of a logit": "1.0e-06"},
        notes=["Train it further."],
    )
    assert header(text) == {"library_name": "transformers", "tags": ["moe", "upcycled"]}
    for part in (
        "# out\n\nCopies.\n\nMade from `dense` (llama).",
        "```\nmoe upcycle a b\n```",
        "| ratio | 0.5 |",
        "| MoE layers | 0, 2 |",
        "| routed experts | 4 |",
        "| expert FFN width | 48 |",
        "| largest difference of a logit | 1.0e-06 |",
        "Train it further.",
        "no common licence is stated",
    ):
        assert part in text, part
    assert "Not measured" not in text
    assert "Not measured (`--no-verify`)" in card(tmp_path / "dense")


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# x", {"license": "apache-2.0"}),
        ("---\r\nlicense: other\r\nlicense_name: llama3\r\n---\r\n", {"license": "other", "license_name": "llama3"}),
        ("# no header\nlicense: mit", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\nlicense: mit\n", {}),
    ],
)
def test_licence_of_the_source(readme: str, licence: dict, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    (source / "README.md").write_bytes(readme.encode())
    text = card(source)
    assert {key: value for key, value in header(text).items() if key.startswith("license")} == licence
    assert ("whose card says: " in text) == bool(licence)


def test_sources_of_different_licences_and_hub_names(tmp_path: Path) -> None:
    first, second = (save_dense(tmp_path / name) for name in ("a", "b"))
    for folder, licence in ((first, "mit"), (second, "apache-2.0")):
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace("{", f'{{"_name_or_path": "owner/{folder.name}",', 1))
    text = card(first, second)
    assert "license" not in header(text)
    assert header(text)["base_model"] == ["owner/a", "owner/b"]
    assert "Made from `owner/a` (llama), `owner/b` (llama)." in text
    (second / "README.md").write_text("---\nlicense: mit\n---\n")
    assert header(card(first, second))["license"] == "mit"


def test_the_hub_name_of_a_download(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "models--owner--some-model" / "snapshots" / "0123")
    assert "Made from `owner/some-model` (llama)." in card(source)
