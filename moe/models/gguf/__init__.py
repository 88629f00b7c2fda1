"""GGUF files for llama.cpp and what is built on it; needs the package ``gguf`` (extra ``[gguf]``).

llama.cpp computes a fixed set of architectures. `architectures` says which of them computes a given model, `metadata` and
`tensors` what its file holds, `vocabulary` the tokenizer, `write` writes it and `verify` compares it with the original.
"""
