"""ExpertWeaver's carving: profiles, balanced k-means, the gate of mean rows."""

import dataclasses

import pytest
import torch
from convert.carve.carve_case import SHAPE, F, generator, make_case

from moe.convert.carve.weaver import balanced_kmeans, carve, gate_profiles


def test_profiles_are_means_over_windows() -> None:
    case = make_case()
    profiles_FP = gate_profiles(case.ffn.gate_FD, case.inputs)
    for window in range(5):
        rows_TD = case.inputs.x_TD[case.inputs.sequence_T == window]
        gates_TF = rows_TD @ case.ffn.gate_FD.T
        torch.testing.assert_close(
            profiles_FP[:, window], (gates_TF * gates_TF.sigmoid()).mean(0), atol=1e-5, rtol=1e-4
        )


def test_shared_neurons_and_gate_rows() -> None:
    case = make_case()
    rows_FD = case.ffn.gate_FD * torch.linspace(0.01, 0.2, F)[:, None]
    mean_D = case.inputs.x_TD.mean(0)
    rows_FD[4:8] = -1.3 * mean_D / mean_D.square().sum()  # gates that are shut: silu is least there
    ffn = dataclasses.replace(case.ffn, gate_FD=rows_FD)
    carving = carve(ffn, case.inputs, SHAPE, generator())
    profiles_FP = gate_profiles(rows_FD, case.inputs)
    largest = set(profiles_FP.abs().mean(1).topk(8).indices.tolist())
    assert largest != set(profiles_FP.mean(1).topk(8).indices.tolist())
    assert set(carving.shared_M.tolist()) == largest
    for members, row_D in zip(carving.routed_RM, carving.gate.weight_RD, strict=True):
        torch.testing.assert_close(row_D, rows_FD[members].mean(0))
    assert (carving.gate.bias_R == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_groups_that_are_there(seed: int) -> None:
    """At the corners of a triangle: what is far from one corner is so from two."""
    random = generator(seed)
    corners_RP = torch.tensor([[1.0, 0.0], [-0.5, 0.866], [-0.5, -0.866]])
    truth_N = torch.arange(3).repeat(20)
    points_NP = corners_RP[truth_N] + 0.12 * torch.randn(60, 2, generator=random)
    group_N = balanced_kmeans(points_NP, 3, random)
    assert torch.bincount(group_N).tolist() == [20, 20, 20]
    assert len({(int(a), int(b)) for a, b in zip(group_N, truth_N, strict=True)}) == 3


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_ends_where_no_swap_helps(seed: int) -> None:
    points_NP = torch.randn(60, 2, generator=generator(seed))
    group_N = balanced_kmeans(points_NP, 4, generator(seed))
    centres_RP = torch.stack([points_NP[group_N == group].mean(0) for group in range(4)])
    distances_NR = torch.cdist(points_NP, centres_RP).square()
    now_N = distances_NR.gather(1, group_N[:, None])[:, 0]
    swapped_NN = distances_NR[:, group_N]  # of each point to the centre of each other point's group
    assert (swapped_NN + swapped_NN.T >= now_N[:, None] + now_N - 1e-4).all()


def test_equal_points_are_shared_out() -> None:
    assert torch.bincount(balanced_kmeans(torch.ones(F, 2), 4, generator())).tolist() == [6, 6, 6, 6]
