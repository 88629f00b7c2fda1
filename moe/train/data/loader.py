"""From samples to the batches of a rank.

Step s of a run consumes the samples [s * G, (s + 1) * G) with G = micro batch x accumulation x ranks, and rank r takes
the r-th part of them. So the samples of a step do not depend on how G is made up, and a run resumes on another number
of ranks, as long as G stays the same, with the very batches it would have seen.

Shape legend: B micro batch, L window length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from moe.train.data.packing import IGNORED_LABEL, PackedDataset, Sample


@dataclass(frozen=True)
class Batch:
    """One micro batch; ids, labels and positions are int64 on the CPU.

    Labels are already shifted: the label at t is the token at t + 1, -100 where there is nothing to learn.
    `attention_mask` is None (plain causal) or bool (B, 1, L, L), True: may attend; torch's and transformers' `sdpa`
    take it as it is, transformers' `eager` needs `additive_mask`.
    """

    input_ids_BL: torch.Tensor
    labels_BL: torch.Tensor
    position_ids_BL: torch.Tensor
    document_ids: list[list[str]]
    attention_mask: torch.Tensor | None


class TrainDataset(Protocol):
    """What a `BatchLoader` needs: `PackedDataset` and `StreamingPackedDataset`."""

    in_document_attention: bool

    def rank_samples(self, first: int, count: int, rank: int, world_size: int) -> list[Sample]:
        """This rank's `count` of the `count * world_size` samples from `first` on."""

    def state_dict(self) -> dict[str, Any]:
        """What `first` does not say."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""


def make_batch(samples: list[Sample], in_document_attention: bool) -> Batch:
    """Stack samples, with the mask of their documents if attention stays inside them."""
    mask = None
    if in_document_attention:
        index_BL = torch.from_numpy(np.stack([sample.document_index_L for sample in samples]))
        causal_LL = torch.ones(index_BL.shape[1], index_BL.shape[1], dtype=torch.bool).tril()
        mask = ((index_BL[:, :, None] == index_BL[:, None, :]) & causal_LL)[:, None]
    return Batch(
        input_ids_BL=torch.from_numpy(np.stack([sample.input_ids_L for sample in samples])),
        labels_BL=torch.from_numpy(np.stack([sample.labels_L for sample in samples])),
        position_ids_BL=torch.from_numpy(np.stack([sample.position_ids_L for sample in samples])),
        document_ids=[sample.document_ids for sample in samples],
        attention_mask=mask,
    )


def additive_mask(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where the bool mask is True, the lowest number of `dtype` elsewhere.

    For transformers' `eager` attention, which adds a mask to the scores: a bool one would be added as 0 and 1, and hide
    nothing, without an error.
    """
    zeros = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return zeros.masked_fill(~attention_mask, torch.finfo(dtype).min)


class BatchLoader:
    """The batches of one rank, step by step."""

    def __init__(
        self, dataset: TrainDataset, micro_batch_size: int, rank: int, world_size: int, grad_accum: int = 1
    ) -> None:
        for field, value in (("micro_batch_size", micro_batch_size), ("grad_accum", grad_accum)):
            if value < 1:
                raise ValueError(f"{field}={value}: it must be at least 1")
        assert 0 <= rank < world_size, (rank, world_size)
        self.dataset = dataset
        self.micro_batch_size, self.grad_accum = micro_batch_size, grad_accum
        self.rank, self.world_size = rank, world_size
        self.next_sample = 0

    @property
    def global_batch_size(self) -> int:
        """Samples of a step, over all ranks."""
        return self.micro_batch_size * self.grad_accum * self.world_size

    def next_step(self) -> list[Batch]:
        """This rank's `grad_accum` micro batches of the next optimizer step."""
        size = self.micro_batch_size
        samples = self.dataset.rank_samples(self.next_sample, size * self.grad_accum, self.rank, self.world_size)
        self.next_sample += self.global_batch_size
        in_document = self.dataset.in_document_attention
        return [make_batch(samples[i : i + size], in_document) for i in range(0, len(samples), size)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable. The same on all ranks for a `PackedDataset`; a stream's is each rank's own."""
        return {"next_sample": self.next_sample, "dataset": self.dataset.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last step before `state` was taken."""
        self.dataset.load_state_dict(state["dataset"])
        self.next_sample = state["next_sample"]


def eval_batches(
    dataset: PackedDataset, micro_batch_size: int, rank: int, world_size: int, max_windows: int
) -> Iterator[Batch]:
    """This rank's part of the first `max_windows` windows of `dataset`, as many batches of one size on every rank.

    Windows beyond the last are copies of the first with every label -100 and no document ids, so that ranks stay in
    step and a model sees real text.
    """
    num_windows = min(max_windows, dataset.samples_per_epoch)
    for begin in range(0, num_windows, micro_batch_size * world_size):
        first = begin + rank * micro_batch_size
        samples = [
            dataset.sample(index) if index < num_windows else _padding(dataset)
            for index in range(first, first + micro_batch_size)
        ]
        yield make_batch(samples, dataset.in_document_attention)


def _padding(dataset: PackedDataset) -> Sample:
    sample = dataset.sample(0)
    return Sample(
        input_ids_L=sample.input_ids_L,
        labels_L=np.full_like(sample.labels_L, IGNORED_LABEL),
        position_ids_L=sample.position_ids_L,
        document_index_L=sample.document_index_L,
        document_ids=[],
    )
