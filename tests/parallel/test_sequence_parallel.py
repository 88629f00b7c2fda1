"""What `SequenceParallel` refuses, and that it leaves nothing behind; that it is the same training is in test_parity.py."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from tiny_run import Run, build_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe.parallel.sequence_parallel import SequenceParallel

REFUSED: dict[str, tuple[int, Run, dict[str, Any], str]] = {
    "eager": (2, Run(), {}, "parallel.sp_size=2 needs an attention"),
    "heads": (2, Run(), {"num_attention_heads": 1, "hidden_size": 8}, "num_attention_heads=1 is not divisible"),
    "kv_heads": (
        2,
        Run(),
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24},
        "num_key_value_heads=3",
    ),
    "sequence_loss": (2, Run(balance={"aux_coef": 0.1, "aux_scope": "sequence"}), {}, "aux_scope=sequence"),
    "processes": (3, Run(), {}, "parallel.sp_size=3 does not divide the 2 processes"),
}


def refusals(rank: int, world_size: int) -> dict[str, str]:
    found = {}
    for name, (size, run, decoder, _) in REFUSED.items():
        model = build_model(run, **decoder)
        if name == "eager":
            model.set_attn_implementation("eager")
        before = dict(ALL_ATTENTION_FUNCTIONS)
        try:
            SequenceParallel(size).install(model)
            found[name] = "accepted"
        except ValueError as problem:
            found[name] = str(problem)
        assert dict(ALL_ATTENTION_FUNCTIONS) == before
    return found


@pytest.fixture(scope="module")
def messages() -> list[dict[str, str]]:
    return run_ranks(refusals, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(messages: list[dict[str, str]], name: str) -> None:
    for found in messages:
        assert REFUSED[name][-1] in found[name]


def whole_and_pieces(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Logits of the same model before, while and after its attention is shared; with documents, and a batch of each size."""
    model = build_model(replace(Run(), moe={"num_shared_experts": 0})).eval()
    ids_BL = torch.arange(24).view(2, 12) % 61
    positions_BL = torch.tensor([[*range(7), *range(5)], [*range(3), *range(9)]])
    documents_BL = (positions_BL == 0).cumsum(1)
    mask = (documents_BL[:, :, None] == documents_BL[:, None]) & torch.ones(12, 12, dtype=torch.bool).tril()
    groups = [layer.self_attn.num_key_value_groups for layer in model.model.layers]
    found = {}
    with torch.no_grad():
        found["whole"] = model(ids_BL, attention_mask=mask[:, None], position_ids=positions_BL).logits
        found["plain"] = model(ids_BL[:1]).logits
        sequences = SequenceParallel(2)
        sequences.install(model)
        own, own_positions = sequences.piece(ids_BL), sequences.piece(positions_BL)
        found["piece"] = model(own, attention_mask=mask[:, None], position_ids=own_positions).logits
        place = sequences.piece(torch.arange(12)[None])
        found["plain_piece"] = model(own[:1], position_ids=place).logits
        sequences.remove()
        found["after"] = model(ids_BL, attention_mask=mask[:, None], position_ids=positions_BL).logits
    assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == groups
    return found


def test_pieces_are_the_whole() -> None:
    by_rank = run_ranks(whole_and_pieces, 2)
    for whole, piece in (("whole", "piece"), ("plain", "plain_piece")):
        together = torch.cat([found[piece] for found in by_rank], dim=1)
        torch.testing.assert_close(together, by_rank[0][whole], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(by_rank[0]["whole"][:1], by_rank[0]["plain"], atol=1e-2), "the documents matter"
    for found in by_rank:
        assert torch.equal(found["after"], found["whole"])
