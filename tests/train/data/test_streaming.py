import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from moe.train.data.documents import Split
from moe.train.data.hub_source import StreamSource
from moe.train.data.packing import PackedDataset
from moe.train.data.streaming import StreamingPackedDataset
from tests.train.data.small_data import make_text, token_cache

NOTHING_HELD_OUT = Split(seed=0, threshold=0.0)
SEQ_LEN = 16


def write_rows(folder, num_files, rows_per_file=6):
    for file in range(num_files):
        rows = [
            {"text": make_text(100 * file + row, num_words=4 + 5 * row), "row": row} for row in range(rows_per_file)
        ]
        rows.insert(2, {"text": None, "row": -1})
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sorted(str(path) for path in folder.glob("*.jsonl"))


@pytest.fixture(autouse=True)
def no_download_counter(monkeypatch):
    """`load_dataset` reports every use to the hub, and waits for the time-out where there is no network."""
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@pytest.fixture(params=[1, 3, 4], ids=lambda count: f"{count}-files")
def files(request, tmp_path):
    return write_rows(tmp_path, request.param)


def stream(files, encoder, rank=0, world_size=1, split=NOTHING_HELD_OUT, in_document=False):
    rows = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    document = StreamSource("local", None, "train", "text").document
    return StreamingPackedDataset(rows, document, split, encoder, SEQ_LEN, rank, world_size, in_document)


def flat(sample):
    arrays = (sample.input_ids_L, sample.labels_L, sample.position_ids_L, sample.document_index_L)
    return [*(array.tolist() for array in arrays), sample.document_ids]


def texts_of(dataset, tokenizer, num_samples):
    """The documents that a stream of windows spells, without the last, which may be cut."""
    ids = np.concatenate([dataset.next_sample().input_ids_L for _ in range(num_samples)])
    return tokenizer.decode(ids).split("<|endoftext|>")[:-1]


def all_texts(files):
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    return [row["text"] for row in rows if row["text"]]


def test_first_pass_is_the_documents_in_order(files, encoder, tokenizer):
    expected = all_texts(files)
    num_tokens = sum(len(encoder.encode_document(text)) for text in expected)
    read = texts_of(stream(files, encoder), tokenizer, num_tokens // SEQ_LEN + 40)
    assert read[: len(expected)] == expected
    assert set(read[len(expected) :]) <= set(expected) and len(read) > len(expected), "then it starts again"


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_every_document_once_per_pass(files, encoder, world_size):
    document = StreamSource("local", None, "train", "text").document
    expected = [document({"text": text}).id for text in all_texts(files)]
    read = []
    for rank in range(world_size):
        dataset = stream(files, encoder, rank, world_size)
        names = []
        while dataset.state_dict()["epoch"] == 0:
            for name in dataset.next_sample().document_ids:
                if name not in names:
                    names.append(name)
        read.append(names)
    # a rank may have begun its second pass in the last window, with a document of its own: seen already
    assert sorted(name for names in read for name in names) == sorted(expected)


@pytest.mark.parametrize("in_document", [False, True])
def test_windows_equal_those_of_a_packed_dataset(files, encoder, in_document):
    """The same documents in the same order, as lengths: labels, positions and documents must agree."""
    lengths = [len(encoder.encode_document(text)) for text in all_texts(files)]
    packed = PackedDataset(token_cache(lengths), SEQ_LEN, None, in_document)
    dataset = stream(files, encoder, in_document=in_document)
    for index in range(packed.samples_per_epoch):
        expected, actual = packed.sample(index), dataset.next_sample()
        assert actual.document_index_L.tolist() == expected.document_index_L.tolist()
        assert actual.position_ids_L.tolist() == expected.position_ids_L.tolist()
        assert (actual.labels_L == -100).tolist() == (expected.labels_L == -100).tolist()
        learnt = actual.labels_L[:-1] != -100
        assert actual.labels_L[:-1][learnt].tolist() == actual.input_ids_L[1:][learnt].tolist()
        assert len(actual.document_ids) == len(expected.document_ids)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_exact_from_every_step_and_across_passes(files, encoder, world_size):
    for rank in range(world_size):
        dataset = stream(files, encoder, rank, world_size)
        states, samples = [], []
        while dataset.state_dict()["epoch"] < 2:
            states.append(json.dumps(dataset.state_dict()))
            samples.append(flat(dataset.next_sample()))
        for step in range(0, len(states), 3):
            resumed = stream(files, encoder, rank, world_size)
            resumed.load_state_dict(json.loads(states[step]))
            assert json.dumps(resumed.state_dict()) == states[step], "saved again before the first sample"
            expected = samples[step : step + 12]
            assert [flat(resumed.next_sample()) for _ in expected] == expected


def test_resume_into_a_dataset_that_was_already_read(files, encoder):
    dataset = stream(files, encoder)
    state = dataset.state_dict()
    first = [flat(dataset.next_sample()) for _ in range(60)]
    dataset.load_state_dict(state)
    assert [flat(dataset.next_sample()) for _ in range(60)] == first


def test_held_out_documents_are_not_read(files, encoder, tokenizer):
    split = Split(seed=0, threshold=0.4)
    document = StreamSource("local", None, "train", "text").document
    expected = [text for text in all_texts(files) if not split.is_held_out(document({"text": text}).id)]
    assert 0 < len(expected) < len(all_texts(files))
    read = texts_of(stream(files, encoder, split=split), tokenizer, 400)
    assert read[: len(expected)] == expected and set(read) == set(expected)


def test_long_documents_stay_exact(tmp_path, encoder, tokenizer):
    text = make_text(0, 30_000)
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}) + "\n")
    num_samples = len(encoder.encode_document(text)) // SEQ_LEN + 1
    assert texts_of(stream([str(tmp_path / "x.jsonl")], encoder), tokenizer, num_samples)[0] == text


def test_states_of_others_are_refused(files, encoder):
    state = stream(files, encoder, 0, 2).state_dict()
    with pytest.raises(ValueError, match="rank 0 of 2, this is rank 1 of 2"):
        stream(files, encoder, 1, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="rank 0 of 2, this is rank 0 of 1; start as many ranks"):
        stream(files, encoder).load_state_dict(state)
    with pytest.raises(ValueError, match=r"set data.streaming=false"):
        stream(files, encoder).load_state_dict({})
    with pytest.raises(ValueError, match=r"set data.streaming=true"):
        PackedDataset(token_cache([20]), 4, 0).load_state_dict(state)


def test_rank_without_documents_is_an_error(files, encoder):
    with pytest.raises(ValueError, match=r"rank 0 of 1 got no training document.*data.eval_fraction"):
        stream(files, encoder, split=Split(0, 1.0)).next_sample()
