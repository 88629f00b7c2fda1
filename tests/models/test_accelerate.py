"""`accelerate` loops give the weights of plain ones; autocast reaches the experts and not the router."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from models.tiny import assert_near, gradients, layers_of, make_model, tokens
from torch import Tensor, nn

from moe.models import MoEForCausalLM

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

BALANCE = {"aux_coef": 0.5, "bias_update_rate": 0.125}
NOAUX = {"router": {"name": "noaux_tc"}, "num_shared_experts": 1, "balance": BALANCE}


def micro_batches(count: int = 6) -> Iterator[dict[str, Tensor]]:
    for seed in range(count):
        ids = tokens(2, 9, seed)
        yield {"input_ids": ids, "labels": ids}


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_accumulation_equals_a_plain_loop(use_reentrant: bool | None) -> None:
    plain = make_model(**NOAUX)
    optimizer = optimizer_for(plain)
    for index, batch in enumerate(micro_batches()):
        (plain(**batch).loss / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()

    model = make_model(**NOAUX)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    prepared, wrapped = accelerator.prepare(model, optimizer_for(model))
    for batch in micro_batches():
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            wrapped.step()
            wrapped.zero_grad()
    got, expected = accelerator.unwrap_model(prepared).state_dict(), plain.state_dict()
    start = make_model(**NOAUX).state_dict()
    for name, value in expected.items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4, msg=name)


def run(model: MoEForCausalLM, mixed_precision: str) -> tuple[float, dict[str, Tensor]]:
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=True)
    prepared = accelerator.prepare(model)
    loss = prepared(**next(micro_batches(1))).loss
    accelerator.backward(loss)
    return loss.item(), gradients(model)


def test_autocast_reaches_the_experts_and_not_the_router() -> None:
    model = make_model(**NOAUX)
    seen: dict[str, torch.dtype] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, getattr(output, "logits_TE", output).dtype)

    layer = layers_of(model)[0]
    for name in ("router", "experts", "shared_experts"):
        layer.get_submodule(name).register_forward_hook(note(name))
    _, got = run(model, "bf16")
    assert seen == {"router": torch.float32, "experts": torch.bfloat16, "shared_experts": torch.bfloat16}
    assert {value.dtype for value in got.values()} == {torch.float32}
    assert all(value.isfinite().all() for value in got.values())


def test_bf16_gradients_are_near_fp32_ones(fresh_accelerate: None) -> None:
    """Routed as in fp32 (a flipped choice would show as a gross difference), with one expert per token left out."""
    options: dict[str, Any] = {"num_shared_experts": 1, "balance": {"aux_coef": 0.5, "z_coef": 0.1}}
    options |= {"num_experts": 4, "router": {"name": "topk", "top_k": 4}}
    loss32, expected = run(make_model(**options), "no")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    loss16, got = run(make_model(**options), "bf16")
    assert loss16 == pytest.approx(loss32, rel=2e-2)
    assert loss16 != loss32
    for name, value in expected.items():
        error = (got[name] - value).square().mean().sqrt() / value.square().mean().sqrt()
        assert error < 0.08, f"{name}: {error:.3f}"


def test_gradient_scaling_leaves_the_balance_losses_in_proportion() -> None:
    """A loss scaled by 2^16 and unscaled gradients, as fp16 training does it."""
    model = make_model(**NOAUX)
    batch = next(micro_batches(1))
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    (model(**batch).loss * 2**16).backward()
    assert_near({name: value / 2**16 for name, value in gradients(model).items()}, expected)
