"""ReLU routing (arXiv 2412.14711): continuity, the regulariser, and the controller of its coefficient."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from helpers.close import assert_close
from helpers.fitting import DIM, check_training, fit_layer, one_model_step
from helpers.layer_oracle import make_layer
from helpers.routing import make_router
from models.tiny import layers_of, make_model, tokens
from torch import Tensor

from moe.layer import finish_step
from moe.models import MoEForCausalLM
from moe.routers.balance import BalanceConfig
from moe.routers.base import Router, StepLoad
from moe.routers.relu import LEAST_COEF, MOST_COEF, l1_loss
from moe.types import TokenInfo

T, E = 60, 5


def relu_router(**options: object) -> Router:
    return make_router(E, E, logits=True, name="relu", **options)


def load_of(density: float, num_experts: int = E) -> StepLoad:
    counts_E = torch.zeros(num_experts, dtype=torch.int64)
    return StepLoad(counts_E=counts_E, model_density=torch.tensor(density), reduce=lambda tensor: tensor)


def test_weights_are_the_positive_logits() -> None:
    x_TD = torch.randn(T, E, requires_grad=True)
    routing = relu_router()(x_TD)
    expected = [(t, e, v) for t, row in enumerate(x_TD.tolist()) for e, v in enumerate(row) if v > 0]
    got = zip(routing.token_ids_N.tolist(), routing.expert_ids_N.tolist(), routing.weights_N.tolist(), strict=True)
    assert list(got) == expected
    routing.weights_N.sum().backward()
    assert torch.equal(x_TD.grad, (x_TD > 0).float()), "inactive experts get no gradient"
    assert torch.equal(routing.logits_TE, x_TD)
    active_TE = x_TD.detach().relu()
    some_T = active_TE.sum(-1) > 0
    assert not some_T.all()
    torch.testing.assert_close(routing.probs_TE[some_T], active_TE[some_T] / active_TE[some_T].sum(-1, keepdim=True))
    assert (routing.probs_TE[~some_T] == 1 / E).all()


def test_output_is_continuous_where_an_expert_starts() -> None:
    """Through zero the output moves as little as the logit does; a top-k gate would jump."""
    layer = make_layer(E, num_experts=E, router={"name": "relu"})
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E))
    outputs = []
    for value in (-1e-4, 0.0, 1e-4, 2e-4):
        x_TD = torch.ones(1, E)
        x_TD[0, 2] = value
        outputs.append((layer(x_TD).detach(), len(layer.router(x_TD).weights_N)))
    assert [count for _, count in outputs] == [E - 1, E - 1, E, E]
    for (before_TD, _), (after_TD, _) in itertools.pairwise(outputs):
        assert (after_TD - before_TD).abs().max() < 1e-3


def l1_oracle(weights_TE: Tensor, top_k: int, keep: list[bool]) -> Tensor:
    rows = [t for t, kept in enumerate(keep) if kept]
    total = weights_TE.sum() * 0
    for e in range(E):
        count = sum(bool(weights_TE[t, e] > 0) for t in rows)
        for t in rows:
            total = total + E / (top_k * len(rows)) * count * weights_TE[t, e] / len(rows)
    return total


@pytest.mark.parametrize("padding", [False, True])
def test_l1_loss_against_the_loop(padding: bool) -> None:
    keep_T = torch.rand(T) < 0.6 if padding else None
    weights_TE = (torch.randn(T, E) + torch.linspace(-1, 1, E)).relu().double().requires_grad_()
    oracle_TE = weights_TE.detach().clone().requires_grad_()
    value = l1_loss(weights_TE, 2, keep_T)
    expected = l1_oracle(oracle_TE, 2, [True] * T if keep_T is None else keep_T.tolist())
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(weights_TE.grad, oracle_TE.grad)
    per_expert_E = weights_TE.grad.max(0).values
    assert per_expert_E[-1] > 2 * per_expert_E[0], "crowded experts are pushed harder"


def test_l1_loss_worked_values() -> None:
    even_TE = torch.tensor([[3.0, 0], [0, 3]])  # every expert has its share K / E = 1/2: f = 1, L = the mean sum
    assert l1_loss(even_TE, 1).item() == pytest.approx(3)
    crowded_TE = torch.tensor([[3.0, 0], [3, 0]])  # f = (2, 0)
    assert l1_loss(crowded_TE, 1).item() == pytest.approx(6)
    assert l1_loss(torch.zeros(4, 2), 1) == 0
    assert l1_loss(torch.zeros(0, 2), 1) == 0
    assert l1_loss(even_TE, 1, torch.tensor([False, False])) == 0


def test_the_loss_is_part_of_training_only_and_excludes_padding() -> None:
    router, x_TD = relu_router(l1_coef=0.25), torch.randn(T, E)
    keep_T = torch.rand(T) < 0.5
    loss = router(x_TD, TokenInfo(keep_T=keep_T)).aux_losses["l1"]
    assert loss.coef == 0.25
    assert loss.value == l1_loss(x_TD.relu(), 2, keep_T)
    assert router.eval()(x_TD).aux_losses == {}


def test_the_layer_adds_lambda_times_the_gradient_of_the_loss() -> None:
    layer = make_layer(DIM, router={"name": "relu", "l1_coef": 0.3})
    x_TD = torch.randn(T, DIM)
    (layer(x_TD) * 0).sum().backward()
    weight_ED = layer.router.weight.detach().double().requires_grad_()
    (0.3 * l1_loss((x_TD.double() @ weight_ED.T).relu(), 2)).backward()
    assert_close("dweight", layer.router.weight.grad, weight_ED.grad, torch.float32)


def test_the_switch_loss_does_not_apply() -> None:
    layer = make_layer(DIM, router={"name": "relu"}, balance=BalanceConfig(aux_coef=0.5))
    layer(torch.randn(T, DIM)).sum().backward()
    assert {name for name in layer.stats.sums if name.startswith("loss/")} == {"loss/l1"}


def test_controller() -> None:
    """More active than K / E: up by alpha; fewer, or exactly as many: down by alpha."""
    router = relu_router(l1_coef=1e-3)
    coef, target = 1e-3, 2 / E
    for density, factor in (
        (0.9, 1.2),
        (target + 1e-4, 1.2),
        (target - 1e-4, 1 / 1.2),
        (0.0, 1 / 1.2),
        (target, 1 / 1.2),
    ):
        router.after_step(load_of(density))
        coef *= factor
        assert router.l1_coef.item() == pytest.approx(coef, rel=1e-5), density


def test_controller_of_a_model_equals_the_target_exactly() -> None:
    """Densities come as a ratio of counts: 1/3 of the pairs must count as equal to K / E = 1 / 3."""
    router = make_router(4, 3, name="relu", top_k=1, l1_coef=1e-3)
    density = torch.tensor(1000) / torch.tensor(3000)
    router.after_step(dataclasses.replace(load_of(0.0, 3), model_density=density))
    assert router.l1_coef.item() == pytest.approx(1e-3 / 1.2, rel=1e-5)


def test_lambda_stays_in_bounds_and_comes_back() -> None:
    router = relu_router()
    for _ in range(1000):
        router.after_step(load_of(0.0))
    assert router.l1_coef.item() == pytest.approx(LEAST_COEF)
    for _ in range(1000):
        router.after_step(load_of(1.0))
    assert router.l1_coef.item() == pytest.approx(MOST_COEF)


def test_lambda_is_fp32_saved_and_reset() -> None:
    router = relu_router()
    assert router.l1_coef.item() == pytest.approx(1e-8)
    for _ in range(5):
        router.after_step(load_of(1.0))
    value = router.l1_coef.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.l1_coef.dtype == torch.float32
    assert torch.equal(router.l1_coef, value)
    other = relu_router()
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.l1_coef, value)
    router.reset_parameters(0.02)
    assert router.l1_coef.item() == pytest.approx(1e-8)


def test_lambda_survives_saving_a_model(tmp_path: Path) -> None:
    """Loading initialises what is not in the file, and lambda is."""
    model = one_model_step({"name": "relu"})
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = MoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for ours, theirs in zip(layers_of(model), layers_of(loaded), strict=True):
            assert theirs.router.l1_coef.dtype == torch.float32
            assert torch.equal(theirs.router.l1_coef, ours.router.l1_coef)
            assert theirs.router.l1_coef != 1e-8


def test_moving_lambda_leaves_a_graph_alone() -> None:
    router, x_TD = relu_router(), torch.randn(T, E, requires_grad=True)
    loss = router(x_TD).aux_losses["l1"]
    total = loss.coef * loss.value
    router.after_step(load_of(1.0))
    total.backward()
    assert x_TD.grad.abs().max() > 0


def test_a_token_without_an_expert_has_its_residual_alone() -> None:
    layer = make_layer(E, num_experts=E, router={"name": "relu"})
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E))
    x_TD = torch.randn(4, E)
    x_TD[1] = -1.0
    x_TD.requires_grad_()
    y_TD = layer(x_TD)
    assert (y_TD[1] == 0).all()
    assert (y_TD[0] != 0).any()
    routing = layer.router(x_TD)
    torch.testing.assert_close(routing.probs_TE[1], torch.full((E,), 1 / E))
    (y_TD.sum() + routing.probs_TE.square().sum()).backward()
    assert x_TD.grad.isfinite().all()
    assert (layer(-x_TD.detach().abs()) == 0).all(), "no expert at all"


@pytest.mark.parametrize("top_k", [2, 3])
def test_density_converges_to_its_target(top_k: int) -> None:
    """The same layer and data, and the controller alone decides between two and three of eight experts."""
    router = {"name": "relu", "top_k": top_k, "l1_coef": 0.1, "l1_step": 1.1}
    fitted = fit_layer(400, lr=0.03, mean=0.5, num_experts=8, router=router)
    assert sum(fitted.densities[-100:]) / 100 * 8 == pytest.approx(top_k, rel=0.1)
    assert sum(fitted.losses[-20:]) < 0.7 * sum(fitted.losses[:20]), "nothing is learned"


def test_layers_of_a_model_share_lambda_by_their_mean_density() -> None:
    """One layer is dense and one is silent; what counts is their mean, a half, against K / E."""
    for top_k, up in ((1, True), (3, False)):
        model = make_model(router={"name": "relu", "top_k": top_k}, balance={"aux_coef": 0.0})
        layers = layers_of(model)
        ids_BL = tokens(2, 9)
        model(input_ids=ids_BL, labels=ids_BL).loss.backward()
        layers[0].stats.counts_E = torch.full((4,), 18)
        layers[1].stats.counts_E = torch.zeros(4, dtype=torch.int64)
        finish_step(layers)
        expected = 1e-8 * 1.2 if up else 1e-8 / 1.2
        assert [layer.router.l1_coef.item() for layer in layers] == pytest.approx([expected] * 2, rel=1e-5)


def test_evaluation_and_skipped_steps_leave_lambda_alone() -> None:
    model = one_model_step({"name": "relu"})
    layers = layers_of(model)
    before = layers[0].router.l1_coef.clone()
    ids_BL = tokens(2, 9)
    model.eval()(input_ids=ids_BL)
    model.train()(input_ids=ids_BL, labels=ids_BL).loss.backward()
    finish_step(layers, applied=False)
    assert torch.equal(layers[0].router.l1_coef, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"router.top_k=0 must be at least 1"),
        ({"top_k": 6}, r"router.top_k=6 is more than num_experts=5; lower it or add experts"),
        ({"l1_coef": 0.0}, r"router.l1_coef=0.0 must lie in \[1e-12, 1000000.0\]"),
        ({"l1_step": 1.0}, r"router.l1_step=1.0 must be above 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relu_router(**options)


def test_it_trains() -> None:
    fitted = check_training({"name": "relu"})
    assert fitted.layer.router.l1_coef.item() != pytest.approx(1e-8, rel=0.1)
