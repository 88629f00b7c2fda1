"""The commands of `moe`, one file each: options in, a call to the layers below, output.

A file here is imported for every `moe --help`, so it imports torch, transformers and the layers below inside its function.
"""
