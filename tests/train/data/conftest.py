import pytest

from moe.train.data.tokenizer import Encoder, make_encoder, train_tokenizer
from tests.train.data.small_data import ListSource, make_text


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(ListSource(tuple(make_text(seed) for seed in range(20))).documents(), 300, 1 << 20)


@pytest.fixture(scope="session")
def encoder(tokenizer) -> Encoder:
    return make_encoder(tokenizer)
