"""Model folders with a real tokenizer, small enough to be run through the commands."""

from pathlib import Path
from typing import Any

from models.tiny import decoder_config, make_model

TEXT = "the cat sat on the mat, and the dog sat on the cat; naïve 猫\n" * 12


def write_tokenizer(path: Path, text: str = TEXT) -> int:
    """Train a byte-level tokenizer on ``text``, save it, and return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(path)
    return len(fast)


def write_model(path: Path, text: str = TEXT, seed: int = 0, **moe: Any) -> Path:
    """Our model, with a tokenizer."""
    decoder = {"vocab_size": write_tokenizer(path, text), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    make_model(decoder=decoder, seed=seed, num_shared_experts=1, **moe).eval().save_pretrained(path)
    return path


def write_mixtral(path: Path, **values: Any) -> Path:
    """A stock MoE of transformers, with the same tokenizer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    decoder = decoder_config(vocab_size=write_tokenizer(path), bos_token_id=None, eos_token_id=0, pad_token_id=None)
    fields = decoder.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    more = ("num_key_value_heads", "max_position_embeddings", "initializer_range", "eos_token_id")
    torch.manual_seed(1)
    chosen = {name: fields[name] for name in (*kept, *more)} | {"num_local_experts": 4, "bos_token_id": None}
    config = MixtralConfig(**(chosen | values))
    MixtralForCausalLM(config).eval().save_pretrained(path)
    return path
