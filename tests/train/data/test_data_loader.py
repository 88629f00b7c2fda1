import itertools
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moe.train.data import BatchLoader, PackedDataset, additive_mask, eval_batches
from tests.train.data.small_data import token_cache

LENGTHS = [5, 40, 3, 17, 90, 1, 8, 33, 60, 12]
SEQ_LEN = 8


def dataset(in_document=False, seed=0):
    return PackedDataset(token_cache(LENGTHS), SEQ_LEN, seed, in_document)


def step_of(ranks):
    """The windows of the next step over all ranks."""
    return [row for rank in ranks for batch in rank.next_step() for row in batch.input_ids_BL.tolist()]


def loaders(world_size, micro, accum):
    return [BatchLoader(dataset(), micro, rank, world_size, accum) for rank in range(world_size)]


SHAPES = [(1, 12, 1), (1, 3, 4), (2, 6, 1), (3, 2, 2), (4, 1, 3), (12, 1, 1)]


def test_steps_do_not_depend_on_how_the_global_batch_is_made_up():
    reference = loaders(1, 12, 1)
    others = [loaders(*shape) for shape in SHAPES]
    for _ in range(7):  # more than two epochs of 33 windows
        expected = step_of(reference)
        for ranks in others:
            assert sorted(step_of(ranks)) == sorted(expected)


def test_steps_are_consecutive_samples():
    ranks = loaders(2, 3, 2)
    for step in range(4):
        expected = [dataset().sample(index).input_ids_L.tolist() for index in range(12 * step, 12 * step + 12)]
        assert step_of(ranks) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_resume_is_exact_at_any_world_size(shape):
    ranks = loaders(2, 3, 2)
    for _ in range(3):
        step_of(ranks)
    states = [json.dumps(rank.state_dict()) for rank in ranks]
    assert states[0] == states[1]
    resumed = loaders(*shape)
    for rank in resumed:
        rank.load_state_dict(json.loads(states[0]))
    for _ in range(3):
        assert sorted(step_of(resumed)) == sorted(step_of(ranks))


def test_batches_have_the_shapes_and_types():
    batches = BatchLoader(dataset(), 3, 0, 1, grad_accum=2).next_step()
    assert len(batches) == 2
    for batch in batches:
        for tensor in (batch.input_ids_BL, batch.labels_BL, batch.position_ids_BL):
            assert tensor.shape == (3, SEQ_LEN) and tensor.dtype == torch.int64
        assert len(batch.document_ids) == 3 and batch.attention_mask is None
        assert torch.equal(batch.input_ids_BL[:, 1:], batch.labels_BL[:, :-1])


def test_mask_against_loops():
    (batch,) = BatchLoader(dataset(in_document=True), 16, 0, 1).next_step()
    assert batch.attention_mask.shape == (16, 1, SEQ_LEN, SEQ_LEN) and batch.attention_mask.dtype == torch.bool
    owner = [document for document, length in enumerate(LENGTHS) for _ in range(length)]
    several = 0
    for row, mask_LL in zip(batch.input_ids_BL.tolist(), batch.attention_mask[:, 0], strict=True):
        owners = [owner[token] for token in row]
        several += len(set(owners)) > 1
        for query in range(SEQ_LEN):
            for key in range(SEQ_LEN):
                assert mask_LL[query, key] == (key <= query and owners[key] == owners[query])
    assert several > 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_transformers_model_sees_separate_documents(attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sum(LENGTHS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    (batch,) = BatchLoader(dataset(in_document=True), 16, 0, 1).next_step()
    mask = batch.attention_mask if attention == "sdpa" else additive_mask(batch.attention_mask, torch.float32)
    with torch.no_grad():
        packed = model(batch.input_ids_BL, attention_mask=mask, position_ids=batch.position_ids_BL).logits
        for row, positions_L in enumerate(batch.position_ids_BL):
            starts = [*(positions_L == 0).nonzero()[:, 0].tolist(), SEQ_LEN]
            for start, end in itertools.pairwise(starts):
                alone = model(batch.input_ids_BL[row : row + 1, start:end]).logits[0]
                torch.testing.assert_close(packed[row, start:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("max_windows", [1, 7, 8, 1000])
def test_evaluation_has_every_window_once_and_as_many_batches_on_each_rank(world_size, max_windows):
    data = dataset(seed=None)
    ranks = [list(eval_batches(data, 4, rank, world_size, max_windows)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    real, padding = [], 0
    for batch in [batch for step in zip(*ranks, strict=True) for batch in step]:
        assert batch.input_ids_BL.shape == (4, SEQ_LEN)
        for inputs, labels, ids in zip(
            batch.input_ids_BL.tolist(), batch.labels_BL.tolist(), batch.document_ids, strict=True
        ):
            if ids:
                real.append(inputs)
                assert inputs[1:] == labels[:-1]
            else:
                padding += 1
                assert set(labels) == {-100}
    count = min(max_windows, data.samples_per_epoch)
    assert real == [list(range(SEQ_LEN * i, SEQ_LEN * (i + 1))) for i in range(count)]
    assert padding == -count % (4 * world_size)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        BatchLoader(dataset(), 0, 0, 1)
    with pytest.raises(ValueError, match="grad_accum=-1"):
        BatchLoader(dataset(), 1, 0, 1, grad_accum=-1)
