"""Published laws give the numbers of their papers' tables, as far as the printed constants allow."""

import math

import pytest

from moe.scaling.laws import LAWS, ModelSize, find_law
from moe.scaling.laws.forms import transformed_expansion
from moe.scaling.laws.joint import learning_rate
from moe.scaling.laws.law import flops_with_routing

GPT2 = 50257
JOINT, FINE = LAWS["joint"], LAWS["fine-grained"]

# arXiv 2402.07871 table 2: N_act of "64 x N_act", D, G, FLOPs, loss.
TABLE_2 = [
    (100e6, 4.37e9, 8, 2.95e18, 3.133),
    (1e9, 28.94e9, 16, 1.93e20, 2.491),
    (3e9, 72.90e9, 16, 1.41e21, 2.245),
    (7e9, 137.60e9, 32, 6.46e21, 2.076),
    (70e9, 941.07e9, 32, 4.16e23, 1.694),
    (300e9, 2.96e12, 64, 5.69e24, 1.503),
    (1e12, 7.94e12, 64, 4.97e25, 1.367),
]


@pytest.mark.parametrize(("active", "tokens", "granularity", "flops", "loss"), TABLE_2)
def test_flops_and_loss_of_the_fine_grained_table(
    active: float, tokens: float, granularity: int, flops: float, loss: float
) -> None:
    size = FINE.size(active, 64, granularity, GPT2, with_embedding=False)
    # N_act, D and FLOPs are printed with three digits, N_act with one
    assert FINE.training_flops(size, tokens) == pytest.approx(flops, rel=0.005)
    # The constants are printed with two or three digits. Losses from them are lower than the table's, never higher.
    assert 0.010 < loss - FINE.loss(size, tokens) < 0.025


def test_64_times_the_active_parameters_is_not_n() -> None:
    size = FINE.size(1e9, 64, 16, GPT2, with_embedding=False)
    assert size.total_blocks == pytest.approx(43 * 1e9)
    assert size.active_blocks == pytest.approx(12 * size.width**2 * size.blocks)
    assert size.width == pytest.approx(64 * size.blocks)


def test_routing_costs_what_equation_10_says() -> None:
    size = ModelSize(width=512, blocks=8, expansion=64, granularity=4, ffn=8, vocab=GPT2)
    assert flops_with_routing(size) == (12 * 512**2 * 6 + 512 * 64 * 4 * 14) * 8
    dense = ModelSize(width=512, blocks=8, expansion=1, granularity=1, ffn=8, vocab=GPT2)
    assert flops_with_routing(dense) == 12 * 512**2 * 6 * 8


# arXiv 2502.05172 table 4: E, m, mu, n, nu of L = m N^mu + n D^nu + c.
TABLE_4 = [
    (1, 30.3640, -0.1817, 53.9838, -0.1965),
    (2, 27.7982, -0.1780, 66.8401, -0.2065),
    (4, 24.8462, -0.1731, 87.7022, -0.2192),
    (8, 21.8330, -0.1676, 119.9126, -0.2338),
    (16, 19.0159, -0.1617, 167.5073, -0.2494),
    (32, 16.5424, -0.1557, 234.6726, -0.2652),
]


@pytest.mark.parametrize(("expansion", "m", "mu", "n", "nu"), TABLE_4)
def test_reduced_coefficients_of_the_joint_law(expansion: int, m: float, mu: float, n: float, nu: float) -> None:
    c, hat = JOINT.constants, float(transformed_expansion(expansion))
    # delta, omega and the exponents are printed with four decimals: 0.3 % of a power of E-hat, 2e-4 of an exponent
    assert c["a"] * hat ** c["delta"] == pytest.approx(m, rel=2e-3)
    assert c["b"] * hat ** c["omega"] == pytest.approx(n, rel=3e-3)
    assert c["alpha"] + c["gamma"] * math.log(hat) == pytest.approx(mu, abs=2e-4)
    assert c["beta"] + c["zeta"] * math.log(hat) == pytest.approx(nu, abs=2e-4)
    size = JOINT.size(1e9, expansion, 1, GPT2, with_embedding=True)
    reduced = m * 1e9**mu + n * 20e9**nu + c["c"]
    assert JOINT.loss(size, 20e9) == pytest.approx(reduced, abs=2e-3)


# arXiv 2502.05172 appendix E: d, n, E, active and total parameters.
APPENDIX_E = [
    (1024, 16, 32, 321e6, 5.0e9),
    (1792, 28, 4, 1.3e9, 3.8e9),
    (2304, 36, 1, 2.7e9, 2.7e9),
    (512, 8, 8, 79e6, 211e6),
    (1408, 21, 8, 683e6, 3.3e9),
]


@pytest.mark.parametrize(("width", "blocks", "expansion", "active", "total"), APPENDIX_E)
def test_parameters_of_the_joint_papers_models(
    width: int, blocks: int, expansion: int, active: float, total: float
) -> None:
    size = ModelSize(width=width, blocks=blocks, expansion=expansion, granularity=1, ffn=9, vocab=GPT2)
    assert size.active == pytest.approx(active, rel=0.04)  # printed with two digits at least
    assert size.total == pytest.approx(total, rel=0.04)


def test_learning_rate_is_of_active_parameters_with_embeddings() -> None:
    printed = math.exp(8.39 - 0.81 * math.log(321e6) - 0.25 * math.log(8))
    assert learning_rate(321e6, 8) == pytest.approx(printed, rel=0.05)  # of -0.8122 the paper prints -0.81
    assert learning_rate(321e6, 1) == pytest.approx(5.44e-4, rel=2e-3)  # by hand
    assert learning_rate(321e6, 16) == pytest.approx(learning_rate(321e6, 1) / 2)


@pytest.mark.parametrize("name", LAWS)
def test_more_of_anything_helps(name: str) -> None:
    law = LAWS[name]
    expansion = law.expansions[0] if law.expansions else 8
    small, large = (law.size(active, expansion, 1, GPT2, with_embedding=False) for active in (5e7, 1e8))
    assert law.loss(large, 2e10) < law.loss(small, 2e10)
    assert law.loss(small, 4e10) < law.loss(small, 2e10)


def test_sizes_invert_the_counts() -> None:
    size = JOINT.size(1.3e9, 8, 1, GPT2, with_embedding=True)
    assert size.active == pytest.approx(1.3e9)
    with pytest.raises(ValueError, match="must be positive"):
        JOINT.size(0, 8, 1, GPT2, with_embedding=True)


def test_laws_refuse_models_they_say_nothing_about() -> None:
    with pytest.raises(ValueError, match="expansion rate 64, and 8 was asked for"):
        FINE.size(1e9, 8, 8, GPT2, with_embedding=False)
    with pytest.raises(ValueError, match="granularity 1, and 8 was asked for"):
        JOINT.size(1e9, 8, 8, GPT2, with_embedding=False)
    with pytest.raises(ValueError, match="at least 1"):
        JOINT.size(1e9, 0.5, 1, GPT2, with_embedding=False)
    with pytest.raises(ValueError, match="did you mean 'fine-grained'"):
        find_law("fine-graned")


def test_extrapolation_is_named_with_its_factor() -> None:
    size = JOINT.size(1e9, 8, 1, GPT2, with_embedding=True)
    assert JOINT.extrapolations(size, 40e9) == []
    size = JOINT.size(27e9, 64, 1, GPT2, with_embedding=True)
    found = JOINT.extrapolations(size, 0.25e9)
    assert any("active parameters 2.7e+10 is 10 times the largest fitted (2.7e+09)" in sentence for sentence in found)
    assert any("tokens 2.5e+08 is 2 times below the smallest fitted (5e+08)" in sentence for sentence in found)
    assert any("expansion 64 is 2 times" in sentence for sentence in found)
    assert any("tokens per active parameter" in sentence for sentence in found)
