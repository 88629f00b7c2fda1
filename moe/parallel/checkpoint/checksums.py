"""Checksums of parameters and moments, one per expert, which do not depend on how a run is spread.

A rank writes the checksums of what it saves; a rank that loads compares them with what it then holds. Names and shapes
cannot tell experts apart, so without them a run resumed with experts in each other's place goes on without an error.

XXH3 with 128 bits: faster than memory is copied. It guards against accidents, not against forgery.
"""

import torch
import xxhash
from torch import Tensor

_CHUNK = 1 << 18  # elements; stays in the processor's cache


def checksum(tensor: Tensor) -> str:
    """Of a tensor's values on whatever device, as 32 hex digits.

    -0.0 counts as 0.0: DeepSpeed puts the pieces of ZeRO 1 and 2 together by a sum with zeros, which loses the sign.
    """
    digest = xxhash.xxh3_128()
    for chunk in tensor.detach().cpu().reshape(-1).split(_CHUNK):
        positive = chunk + 0.0 if chunk.is_floating_point() else chunk
        digest.update(positive.view(torch.uint8).numpy())
    return digest.hexdigest()


def checksums(tensor: Tensor, is_expert: bool) -> list[str]:
    """One checksum per expert (row), or one of the whole tensor."""
    return [checksum(row) for row in tensor] if is_expert else [checksum(tensor)]
