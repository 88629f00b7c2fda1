"""The tokenizer of a model as llama.cpp's ``tokenizer.ggml.*``.

llama.cpp has its own code for each way of cutting text before byte pairs are merged ("pre-tokenizer type"), so the type has
to be recognised; it is, by the steps that the tokenizer's file lists.
"""

import json
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from moe.models.gguf.source import GGUFSource

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Cut:
    """How text is cut before merging.

    Attributes:
        steps: "digits" for single digits, or a regular expression whose matches stay whole; then bytes.
        gpt2_regex: whether the step to bytes cuts by GPT-2's expression first.
        ignore_merges: whether a piece that is a token as a whole is not merged.
    """

    steps: tuple[str, ...]
    gpt2_regex: bool
    ignore_merges: bool


PRE_TOKENIZERS: dict[Cut, str] = {
    Cut((), True, False): "gpt-2",
    Cut(("digits",), True, False): "smollm",
    Cut((_LLAMA3,), False, True): "llama-bpe",
    Cut((_LLAMA3,), False, False): "smaug-bpe",
    Cut((_QWEN2,), False, False): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A byte-level BPE tokenizer.

    Attributes:
        pre_tokenizer: llama.cpp's name of its way to cut text.
        tokens: text of each id.
        types: `gguf.TokenType` of each id.
        merges: pairs, joined by a space, in order of priority.
        special: ids by role: "bos", "eos", "unknown", "padding".
        adds_bos: begin every text with it.
        adds_eos: end every text with it.
        chat_template: Jinja, or ``None``.
    """

    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None

    def add_to(self, writer: Any) -> None:
        """Add all keys to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre_tokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        writer.add_add_space_prefix(False)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(source: GGUFSource) -> Vocabulary | None:
    """The tokenizer of the folder, or ``None`` where it has none.

    Raises:
        ValueError: llama.cpp cannot do what it does; says what that is.
    """
    folder = source.folder.path
    if not any(file.name.startswith(("tokenizer", "vocab")) for file in source.folder.sidecars()):
        return None
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise _unknown(source, f"class {type(tokenizer).__name__} has no tokenizer.json")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pre_tokenizer = _pre_tokenizer(source, state)
    tokens, types = _tokens(source, state)
    adds_bos, adds_eos = _additions(source, tokenizer)
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    template = tokenizer.chat_template
    return Vocabulary(
        pre_tokenizer=pre_tokenizer,
        tokens=tokens,
        types=types,
        merges=merges,
        special={role: token for role, token in special.items() if token is not None},
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        chat_template=template if isinstance(template, str) else None,
    )


def _unknown(source: GGUFSource, what: str) -> ValueError:
    return ValueError(
        f"the tokenizer of {source.folder.path} is none that llama.cpp is known here to have: {what}; leave it out with "
        "`moe export --no-vocabulary`"
    )


def _pre_tokenizer(source: GGUFSource, state: dict[str, Any]) -> str:
    model = state["model"]
    if model["type"] != "BPE":
        raise _unknown(source, f"model {model['type']}")
    for field in ("byte_fallback", "dropout", "fuse_unk", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise _unknown(source, f"BPE with {field}={model[field]!r}")
    # NFC changes only text that is not in the usual normal form; llama.cpp does not apply it.
    if (state.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise _unknown(source, f"normalizer {state['normalizer']}")
    first = state.get("pre_tokenizer") or {"type": "none"}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    last = steps[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unknown(source, f"pre-tokenizer {json.dumps(first)}")
    cut = Cut(tuple(_step(step) for step in steps[:-1]), last["use_regex"], bool(model.get("ignore_merges")))
    if cut not in PRE_TOKENIZERS:
        raise _unknown(source, f"pre-tokenizer {json.dumps(first)} with ignore_merges={cut.ignore_merges}")
    return PRE_TOKENIZERS[cut]


def _step(step: dict[str, Any]) -> str:
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return json.dumps(step)


def _tokens(source: GGUFSource, state: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Text and type of every id of the model, whose embedding may have more rows than the tokenizer has tokens."""
    size = source.decoder.vocab_size
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    found = [(token, index, NORMAL) for token, index in state["model"]["vocab"].items()]
    for added in state["added_tokens"]:
        found.append((added["content"], added["id"], CONTROL if added["special"] else USER_DEFINED))
    for token, index, kind in found:
        if index >= size:
            raise ValueError(f"token {token!r} has id {index}, but vocab_size={size}: not the tokenizer of this model")
        tokens[index], types[index] = token, kind
    return tokens, types


def _additions(source: GGUFSource, tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer begins and ends a text with a special token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if full == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise _unknown(source, f"it makes {full} of a text whose tokens are {plain}")
