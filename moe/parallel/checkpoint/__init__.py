"""Training checkpoints: safetensors, whole parameters by name, atomic, with checksums.

The layout does not depend on how the run was spread: every parameter and moment is stored whole in fp32 (experts as one
slice of rows per expert-parallel rank), each by one of the ranks that hold it. Any world size, expert-parallel degree and
ZeRO stage can read it, and `load_weights` needs no process group at all. DeepSpeed's own files are pickles whose layout is
the run's, so they are not used.

    step-00000040/
        rank-0000.safetensors   weight/NAME, exp_avg/NAME, exp_avg_sq/NAME; NAME@FIRST for the experts from FIRST on;
                                buffer/NAME; rng, rng_cuda; in its header the checksums, one per expert
        state.json              step, data position, model config, fingerprints
        tokenizer.json, ...     what the trainer adds, so that the folder alone is enough for an export
        manifest.json           size and sha256 of every other file; written last

A folder without a valid manifest is no checkpoint: it is written under another name and renamed once complete and synced.
"""

from moe.parallel.checkpoint.files import (
    MANIFEST,
    STATE,
    CheckpointError,
    attachments,
    list_checkpoints,
    newest_valid,
    read_state,
    step_dir,
    verify,
)
from moe.parallel.checkpoint.loading import load
from moe.parallel.checkpoint.reader import CheckpointReader, load_weights, verify_tensors
from moe.parallel.checkpoint.saving import Saved, Saver, save

__all__ = [
    "MANIFEST",
    "STATE",
    "CheckpointError",
    "CheckpointReader",
    "Saved",
    "Saver",
    "attachments",
    "list_checkpoints",
    "load",
    "load_weights",
    "newest_valid",
    "read_state",
    "save",
    "step_dir",
    "verify",
    "verify_tensors",
]
