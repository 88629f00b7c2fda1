import pytest
from pydantic import ValidationError

from moe.train.data import DataConfig


def test_defaults_are_the_standard_library_and_a_trained_tokenizer():
    config = DataConfig()
    assert (config.source, config.seq_len, config.tokenizer.path, config.tokenizer.vocab_size) == (
        "stdlib",
        256,
        None,
        4096,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sorce": "stdlib"}, "sorce"),
        ({"tokenizer": {"vocab": 5}}, "tokenizer.vocab"),
        ({"tokenizer": {"vocab_size": 256}}, "vocab_size"),
        ({"eval_fraction": 1.0}, "eval_fraction"),
        ({"seq_len": 0}, "seq_len"),
        ({"seed": -1}, "seed"),
        ({"streaming": True}, "data.streaming=True applies to hub datasets only.*'stdlib'.*hub:<dataset>"),
        ({"source": "x.txt", "hub_config": "en"}, "data.hub_config='en'.*'x.txt'"),
        ({"source": "x.txt", "split": "test"}, "data.split='test'.*'x.txt'"),
        ({"source": "hub:"}, "names no dataset"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        DataConfig(**values)


def test_hub_fields_are_accepted_with_a_hub_source():
    config = DataConfig(source="hub:a/b", streaming=True, hub_config="en", split="validation")
    assert config.streaming
