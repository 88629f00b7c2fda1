"""The table of all routers in docs/routers.md says what the code does."""

import re
from pathlib import Path

import pytest
import torch
from helpers.routing import make_router

from moe.routers import ROUTERS
from moe.types import Routing, SoftRouting, TokenInfo

DOC = Path(__file__).resolve().parents[2] / "docs" / "routers.md"
T, D, E = 24, 6, 8
INFO = TokenInfo(num_sequences=12, input_ids_T=torch.arange(T))


def rows() -> dict[str, list[str]]:
    """Cells of each row of the table, by the router's name."""
    found = {}
    for line in DOC.read_text().splitlines():
        if match := re.match(r"\| \[`(\w+)`\]\(#[\w-]+\) \|(.*)\|$", line):
            found[match[1]] = [cell.strip() for cell in match[2].split("|")]
    return found


def route(name: str) -> Routing | SoftRouting:
    """With large weights, as after training: what can saturate does."""
    router = make_router(D, E, name=name).train()
    with torch.no_grad():
        for parameter in router.parameters():
            if parameter.dim() > 1:
                parameter.normal_().mul_(5)
    return router(torch.randn(T, D), INFO)


def test_every_router_has_a_row_and_a_page() -> None:
    assert list(rows()) and set(rows()) == set(ROUTERS)
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in DOC.read_text().splitlines()
        if line.startswith("#")
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", DOC.read_text()))
    assert links <= headings, links - headings


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.filterwarnings("ignore:router")
def test_row(name: str) -> None:
    causal, zeros, fixed, extra = rows()[name][:4]
    router = make_router(D, E, name=name)
    assert (router.causal_problem() is None) == causal.startswith("yes")
    routing = route(name)
    sparse = isinstance(routing, Routing) and routing.expert_ids_N.numel() < T * E
    assert sparse == zeros.startswith("yes")
    assert (isinstance(routing, Routing) and routing.top_k is not None) == fixed.startswith("yes")
    parameters = {key for key, _ in router.named_parameters()} - {"weight"}
    assert parameters == (set() if extra.startswith("none") else set(re.findall(r"`(\w+)`", extra)))
    assert ("no gate" in extra or "no trained gate" in extra) == ("weight" not in dict(router.named_parameters()))
