"""The optional package behind GGUF files, imported on use."""

import importlib
from types import ModuleType


def load_gguf() -> ModuleType:
    """The package ``gguf``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ValueError("GGUF files need the package gguf: pip install 'moe-framework[gguf]'") from None
