"""Runs a GGUF file in llama.cpp, in a process of its own: where llama.cpp finds something wrong it ends the process.

`moe.models.gguf.verify` starts this file by its path; it must not import `moe`. Arguments: the GGUF file, a .npy file with token
ids (B, L), the file to write fp32 logits to, the number of threads.

Legend: B windows, L window length, V vocabulary.
"""

import ctypes
import sys

import llama_cpp
import numpy as np


def main(path: str, windows_file: str, out: str, threads: str) -> None:
    """Compute with fp32 caches and without the repacking of weights, so that nothing but the file decides the result."""
    windows_BL = np.load(windows_file)
    length = windows_BL.shape[1]
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    if model is None:
        raise SystemExit("llama.cpp cannot load it")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_threads = params.n_threads_batch = int(threads)
    context = llama_cpp.llama_init_from_model(model, params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    with open(out, "wb") as file:
        for ids_L in windows_BL:
            batch.n_tokens = length
            for index, token in enumerate(ids_L):
                batch.token[index], batch.pos[index], batch.logits[index] = int(token), index, 1
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            if status := llama_cpp.llama_decode(context, batch):
                raise SystemExit(f"llama_decode returned {status}")
            logits = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
            np.ctypeslib.as_array(logits, shape=(length, vocab_size)).tofile(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
