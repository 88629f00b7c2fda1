"""`generate`: the cache, padding, and the ways of decoding."""

import pytest
import torch
from models.tiny import VOCAB, make_model, tokens
from transformers import PreTrainedTokenizerFast

from moe.models.generate import sample_text

KINDS = ["llama", "qwen3", "mistral"]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_a_cache_is_greedy_without(kind: str) -> None:
    model, prompt = make_model(kind, num_shared_experts=1).eval(), tokens(3, 6)
    cached = model.generate(prompt, max_new_tokens=12, do_sample=False)
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    static = model.generate(prompt, max_new_tokens=12, do_sample=False, cache_implementation="static")
    assert cached.shape == (3, 18)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, static)
    by_hand = prompt
    for _ in range(12):
        by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, by_hand)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind: str) -> None:
    model = make_model(kind).eval()
    prompts = [tokens(1, length, seed=length)[0] for length in (3, 7, 5)]
    batch, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        batch[row, 7 - len(prompt) :], mask[row, 7 - len(prompt) :] = prompt, 1
    together = model.generate(batch, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], max_new_tokens=10, do_sample=False)
        assert together[row, 7:].tolist() == alone[0, len(prompt) :].tolist()


def test_beams_find_a_likelier_text_than_greedy() -> None:
    model, prompt = make_model().eval(), tokens(4, 6)

    def log_likelihood(ids: torch.Tensor) -> torch.Tensor:
        scores = model(ids).logits.log_softmax(-1)[:, 5:-1]
        return scores.gather(-1, ids[:, 6:, None]).squeeze(-1).sum(-1)

    greedy = model.generate(prompt, max_new_tokens=8, do_sample=False)
    beams = model.generate(prompt, max_new_tokens=8, do_sample=False, num_beams=6)
    assert beams.shape == greedy.shape
    assert log_likelihood(beams).sum() > log_likelihood(greedy).sum()


def test_sampling_follows_the_seed() -> None:
    model, prompt = make_model().eval(), tokens(2, 6)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model.generate(prompt, max_new_tokens=12, do_sample=True))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_decoders_end_of_text_stops() -> None:
    free = make_model().eval()
    text = free.generate(tokens(1, 6), max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    model = make_model(decoder={"eos_token_id": text[3]}).eval()
    stopped = model.generate(tokens(1, 6), max_new_tokens=8, do_sample=False)[0, 6:].tolist()
    assert stopped == text[: text.index(text[3]) + 1]


def letters() -> PreTrainedTokenizerFast:
    """One token a character: index i of the vocabulary is ``chr(64 + i)``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({chr(64 + i): i for i in range(VOCAB)}, unk_token="@"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="@", eos_token="A")


def test_sample_text() -> None:
    model, tokenizer = make_model(decoder={"pad_token_id": None}).eval(), letters()
    greedy = sample_text(model, tokenizer, "HELLO", 10)
    assert greedy.startswith("HELLO")
    prompt = torch.tensor([[ord(c) - 64 for c in "HELLO"]])
    expected = model.generate(prompt, max_new_tokens=10, do_sample=False)[0].tolist()
    assert greedy == "".join(chr(64 + i) for i in expected if i > 1)
    torch.manual_seed(0)
    hot = sample_text(model, tokenizer, "HELLO", 10, temperature=5.0)
    assert hot != greedy
    torch.manual_seed(0)
    assert sample_text(model, tokenizer, "HELLO", 10, temperature=5.0) == hot
    assert sample_text(model, tokenizer, "HELLO", 10, temperature=1e-4) == greedy
