"""The tokenizer in the file does to text what the model's own does."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from models.gguf.gguf_models import VOCAB, ours
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moe.models.gguf import vocabulary
from moe.models.gguf.verify import check_contents
from moe.models.gguf.write import write_gguf

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed: extra [llama-cpp]"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


CUTS: dict[str, tuple[list[Any], bool]] = {
    "gpt-2": ([GPT2_BYTES], False),
    "smollm": ([pre_tokenizers.Digits(individual_digits=True), GPT2_BYTES], False),
    "llama-bpe": ([split(vocabulary._LLAMA3), BYTES], True),
    "smaug-bpe": ([split(vocabulary._LLAMA3), BYTES], False),
    "qwen2": ([split(vocabulary._QWEN2), BYTES], False),
}
TRAINING = "It's 1234 o'clock; we'll see 100 and 1000 THEY'RE don't\n\n  the other then there   1999 2024! " * 20
TEXTS = [
    "It's 12345 o'clock,  don't   you THEY'RE see?\r\n\r\n x\t\ty  ",
    "größer 東京 🚀🦙 ½ ²³ ٣ café naïve don’t ''' ... ###\n   indented\n\n\n",
    "def f(x):\n    return x**2 + 10_000 - 3.14159  # then there 2024",
]


def make_tokenizer(kind: str, **special: Any) -> PreTrainedTokenizerFast:
    steps, ignore_merges = CUTS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING], trainer)
    fields = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(fields | special))
    made.add_tokens(["<think>"])
    return made


def write(tokenizer: Any, folder: Path, **options: Any) -> Any:
    model = ours()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return write_gguf(folder / "model", folder / "model.gguf", **options)


@pytest.mark.parametrize("kind", CUTS)
def test_tokens_are_there(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind, pad_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    assert write(tokenizer, tmp_path).vocabulary == kind
    keys = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == kind
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert types[:3] == [3, 3, 3] and types[tokenizer.convert_tokens_to_ids("<think>")] == 4
    assert types[10] == 1 and types[-1] == 5 and tokens[-1] == f"[PAD{VOCAB - 1}]"
    special = {key: keys[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "unknown", "padding")}
    assert special == {"bos": 0, "eos": 1, "unknown": 2, "padding": 2}
    assert keys["tokenizer.ggml.add_bos_token"] is False and keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]] == [
        tuple(merge) for merge in state["model"]["merges"]
    ]
    check_contents(tmp_path / "model", tmp_path / "model.gguf", "fp16")


@needs_llama_cpp
@pytest.mark.parametrize("kind", CUTS)
def test_llama_cpp_makes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    from llama_cpp import Llama

    tokenizer = make_tokenizer(kind)
    write(tokenizer, tmp_path)
    llama = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in [*TEXTS, TRAINING]:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert llama.tokenize(text.encode(), add_bos=False) == expected, text
    llama.close()


def test_kinds_differ(tmp_path: Path) -> None:
    """Else the test above would not see a wrong kind."""
    found = {kind: make_tokenizer(kind).tokenize(TEXTS[0]) for kind in CUTS}
    assert found["gpt-2"] != found["smollm"] and found["llama-bpe"] != found["qwen2"] != found["smollm"]


def test_a_first_token_is_noticed(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama-bpe")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    write(tokenizer, tmp_path)
    keys = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_eos_token"] is True


def unknown_cut(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split(r"\d\d"), BYTES])


def prefix_space(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lowercase(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def two_first_tokens(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A", special_tokens=[("<s>", 0), ("<unk>", 2)]
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (unknown_cut, r"pre-tokenizer .*\\\\d\\\\d"),
        (prefix_space, r'pre-tokenizer .*"add_prefix_space": true'),
        (lowercase, "normalizer .*Lowercase"),
        (two_first_tokens, "it makes"),
    ],
)
def test_an_unknown_tokenizer_is_refused_and_can_be_left_out(change: Any, problem: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("gpt-2")
    change(tokenizer)
    with pytest.raises(ValueError, match=problem + ".*leave it out"):
        write(tokenizer, tmp_path)
    written = write_gguf(tmp_path / "model", tmp_path / "model.gguf", no_vocabulary=True)
    assert written.vocabulary is None
    keys = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert keys["tokenizer.ggml.model"] == "no_vocab" and keys["llama.vocab_size"] == VOCAB


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    ours(vocab_size=100).save_pretrained(tmp_path / "model")
    make_tokenizer("gpt-2").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="vocab_size=100: not the tokenizer of this model"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
