"""The README.md of a converted model: how it was made, from what, and how far it is from its source."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from moe import __version__
from moe.models.config import MoEConfig
from moe.models.folder import ModelFolder

CARD = "README.md"
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?\n)---\s*(?:\n|\Z)", re.DOTALL)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known about a converted model.

    Attributes:
        title: its name.
        kind: what was done, as a tag: "upcycled" or "carved".
        command: the command that makes it again.
        sources: the dense models.
        summary: what the method does, in a sentence or two.
        config: of the result, in our form.
        to: the format that it is stored in.
        options: what the method was told.
        checks: measured figures by name, in the order of the table; empty where nothing was measured.
        notes: further sentences.
    """

    title: str
    kind: str
    command: str
    sources: Sequence[ModelFolder]
    summary: str
    config: MoEConfig
    to: str
    options: Mapping[str, object] = field(default_factory=dict)
    checks: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render_card(card: ModelCard) -> str:
    """The text of README.md, with the front matter that model hubs read."""
    licence = _licence(card.sources)
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["moe", card.kind], **licence}
    if hub_names := [name for source in card.sources if _HUB_NAME.fullmatch(name := _name(source))]:
        header["base_model"] = hub_names
    spec = card.config.spec
    structure = {
        "architecture": f"{card.config.text_config.model_type}, stored as {card.to}",  # type: ignore[union-attr]
        "MoE layers": "all" if spec.only_layers is None else ", ".join(map(str, spec.only_layers)),
        "routed experts": spec.num_experts,
        "experts per token": spec.router.get("top_k"),
        "shared experts": spec.num_shared_experts,
        "expert FFN width": spec.hidden(card.config.text_config.intermediate_size),  # type: ignore[union-attr]
        "gate": ", ".join(f"{key}={value}" for key, value in spec.router.items()),
    }
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {card.title}",
        card.summary,
        _sources(card.sources),
        f"## How it was made\n\n```\n{card.command}\n```\n\nWith moe {__version__}.",
        _table("Options", card.options),
        _table("Structure", structure),
        _table("Difference from the source", card.checks) if card.checks else _UNCHECKED,
        "\n".join(card.notes),
        f"## Licence\n\n{_licence_note(card.sources, licence)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_UNCHECKED = "## Difference from the source\n\nNot measured (`--no-verify`)."


def _name(source: ModelFolder) -> str:
    """The hub name where the download's path or the config has one, else the folder's name."""
    path = source.path.resolve()
    for part in path.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    name = str(json.loads((path / "config.json").read_text(encoding="utf-8")).get("_name_or_path", ""))
    return name if _HUB_NAME.fullmatch(name) else path.name


def _sources(sources: Sequence[ModelFolder]) -> str:
    return "Made from " + ", ".join(f"`{_name(source)}` ({source.config.model_type})" for source in sources) + "."


def _table(title: str, values: Mapping[str, object]) -> str:
    rows = [f"| {key} | {value} |" for key, value in values.items()]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *rows]) if rows else ""


def _licence(sources: Sequence[ModelFolder]) -> dict[str, Any]:
    """Licence fields of the sources' own cards, where they all have the same."""
    found = [_header_of(source) for source in sources]
    first = {key: found[0][key] for key in _LICENCE_FIELDS if key in found[0]}
    alike = all({key: other[key] for key in _LICENCE_FIELDS if key in other} == first for other in found)
    return first if alike else {}


def _header_of(source: ModelFolder) -> dict[str, Any]:
    path = source.path / CARD
    match = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        header = None
    return header if isinstance(header, dict) else {}


def _licence_note(sources: Sequence[ModelFolder], licence: Mapping[str, Any]) -> str:
    if "license" in licence:
        return (
            f"The weights come from the source, whose card says: {licence['license']}. Its terms apply to this model."
        )
    names = ", ".join(f"`{_name(source)}`" for source in sources)
    return f"The weights come from {names}, whose terms apply; no common licence is stated in the card of the source. Check it."
