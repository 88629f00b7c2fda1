"""What each scaler chooses, by its paper's formula."""

import torch
from torch import Tensor

from moe.quant.inputs import Rows
from moe.quant.scaling import awq, eaquant, smoothquant
from moe.quant.scaling.sites import Reader, Site
from moe.quant.schemes import SCHEMES

P, Q = 12, 64


def reader(seed: int, num_rows: int = 40, **flags: bool) -> Reader:
    """Some columns have far larger inputs than the others."""
    generator = torch.Generator().manual_seed(seed)
    x_nQ = torch.randn(num_rows, Q, generator=generator)
    x_nQ[:, seed % Q :: 16] *= 20
    weight_PQ = torch.randn(P, Q, generator=generator) * torch.rand(Q, generator=generator)
    rows = Rows(x_nQ=x_nQ, weights_n=torch.rand(num_rows, generator=generator))
    return Reader(name=str(seed), weight_PQ=weight_PQ, rows=lambda: rows, **flags)


def site(kind: str, readers: list[Reader], scale_of_Q: Tensor | None = None) -> Site:
    return Site(name=kind, kind=kind, readers=readers, divide=lambda _: None, scale_of_Q=scale_of_Q)


def term(one: Reader, alpha: float) -> Tensor:
    return one.rows().x_nQ.abs().amax(0) ** alpha / one.weight_PQ.abs().amax(0) ** (1 - alpha)


def chosen(scaler: object, place: Site, scheme: str = "w4a4") -> Tensor:
    scale_S = scaler(place, SCHEMES[scheme], torch.float32)  # type: ignore[operator]
    assert scale_S is not None
    return scale_S


def test_smoothquant_is_over_all_tokens_and_quantized_weights() -> None:
    readers = [reader(1, is_quantized=False), reader(2), reader(3), reader(4, num_rows=0)]
    most_Q = torch.cat([one.rows().x_nQ for one in readers[1:]]).abs().amax(0)
    weight_Q = torch.cat([one.weight_PQ for one in readers[1:]]).abs().amax(0)
    torch.testing.assert_close(chosen(smoothquant.scale, site("moe", readers)), (most_Q / weight_Q).sqrt())
    for kind in ("up", "value"):
        assert smoothquant.scale(site(kind, readers[1:2]), SCHEMES["w8a8"], torch.float32) is None


def test_eaquant_takes_the_largest_term() -> None:
    experts = [reader(2), reader(3), reader(4, num_rows=0)]
    router, gate = reader(5, is_quantized=False, is_rounded_router=True), reader(6, is_quantized=False)
    terms = [one_Q / one_Q.log().mean().exp() for one_Q in (term(one, 0.6) for one in (*experts[:2], router))]
    expected_Q = torch.stack(terms).amax(0)
    torch.testing.assert_close(chosen(eaquant.scale, site("moe", [router, gate, *experts])), expected_Q)
    assert not torch.allclose(expected_Q, torch.stack(terms[:2]).amax(0))
    kept = reader(5, is_quantized=False)
    without_Q = chosen(eaquant.scale, site("moe", [kept, gate, *experts]))
    torch.testing.assert_close(without_Q, torch.stack(terms[:2]).amax(0))


def test_a_reader_of_small_weights_does_not_decide_alone() -> None:
    """A carved model's gate has weights of 1e-3 as a whole."""
    experts, router = [reader(2), reader(3)], reader(5, is_quantized=False, is_rounded_router=True)
    before_Q = chosen(eaquant.scale, site("moe", [router, *experts]))
    router.weight_PQ.mul_(2.0**-10)
    torch.testing.assert_close(chosen(eaquant.scale, site("moe", [router, *experts])), before_Q)


def test_eaquant_of_a_dense_group_is_one_matrix() -> None:
    one, other = reader(2), reader(3)
    other = Reader(name="", weight_PQ=other.weight_PQ, rows=one.rows)
    weight_Q = torch.cat((one.weight_PQ, other.weight_PQ)).abs().amax(0)
    expected_Q = one.rows().x_nQ.abs().amax(0) ** 0.6 / weight_Q**0.4
    for kind in ("attention", "dense"):
        torch.testing.assert_close(chosen(eaquant.scale, site(kind, [one, other])), expected_Q)


def test_eaquant_scales_only_outliers_of_down_projections() -> None:
    one = reader(2)
    one.rows().x_nQ.tanh_()  # all channels reach about as far
    one.rows().x_nQ[:, 2::16] *= 20
    scale_Q = chosen(eaquant.scale, site("up", [one]))
    most_Q = one.rows().x_nQ.abs().amax(0)
    is_outlier_Q = most_Q > 10
    assert is_outlier_Q.sum() == 4
    assert torch.equal(scale_Q[~is_outlier_Q], torch.ones(Q - 4))
    expected = (most_Q[is_outlier_Q] / most_Q[~is_outlier_Q].max()) ** 0.7
    torch.testing.assert_close(scale_Q[is_outlier_Q], expected)
    calm = Reader(name="", weight_PQ=one.weight_PQ, rows=lambda: Rows(x_nQ=torch.ones(3, Q), weights_n=torch.ones(3)))
    assert eaquant.scale(site("up", [calm]), SCHEMES["w4a4"], torch.float32) is None


def test_channels_that_are_always_zero_have_a_scale() -> None:
    one = reader(2)
    one.rows().x_nQ[:, 5] = 0
    one.weight_PQ[:, 9] = 0
    one.weight_PQ[:, 5] = 0
    for scaler in (smoothquant.scale, eaquant.scale, awq.scale):
        scale_Q = chosen(scaler, site("moe", [one]))
        assert bool(scale_Q.isfinite().all()) and bool((scale_Q > 0).all())


def products_error(place: Site, scale_Q: Tensor, scheme_name: str) -> float:
    """Of the quantised products of all readers, each row by the square of its weight."""
    scheme, total = SCHEMES[scheme_name], 0.0
    for one in place.readers:
        rows = one.rows()
        x_nQ = rows.x_nQ / scale_Q
        x_nQ = x_nQ if scheme.activations is None else scheme.activations.simulate(x_nQ)
        y_nP = x_nQ @ scheme.weights.nearest(one.weight_PQ * scale_Q).dequantize().T
        error_n = (y_nP - rows.x_nQ @ one.weight_PQ.T).square().sum(-1)
        total += float(error_n @ rows.weights_n.square())
    return total


def test_awq_finds_the_best_exponent_for_all_experts_together() -> None:
    for scheme in ("w8a16", "w4a4", "fp8"):
        place = site("moe", [reader(1), reader(2, num_rows=90)])
        mean_Q = torch.cat([one.rows().x_nQ for one in place.readers]).abs().mean(0)
        tried = [mean_Q ** (step / 20) for step in range(20)]
        errors = [products_error(place, one / (one.max() * one.min()).sqrt(), scheme) for one in tried]
        best = tried[errors.index(min(errors))]
        torch.testing.assert_close(chosen(awq.scale, place, scheme), best / (best.max() * best.min()).sqrt())
        assert min(errors) < errors[0]


def test_awq_of_a_value_has_a_scale_per_channel_of_a_kv_head() -> None:
    one = reader(2)
    scale_of_Q = torch.arange(Q) % 16
    scale_S = chosen(awq.scale, site("value", [one], scale_of_Q), "w4a16" if Q % 128 == 0 else "w8a16")
    assert scale_S.shape == (16,)


def test_without_any_rows_nothing_is_scaled() -> None:
    for scaler in (smoothquant.scale, eaquant.scale, awq.scale):
        for kind in ("attention", "moe"):
            assert scaler(site(kind, [reader(1, num_rows=0)]), SCHEMES["w4a4"], torch.float32) is None
