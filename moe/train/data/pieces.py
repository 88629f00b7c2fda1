"""Cut long texts and files into pieces, at line ends where there are some.

Why: a file may be one 50 MB line. Blocks of a file bound the memory of a document and let a single file be split into
training and held-out text; pieces of a document bound what one call of the tokenizer sees.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path

PIECE_CHARS = 1 << 16


def text_pieces(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Consecutive parts of at most `limit` characters that join to `text`."""
    start = 0
    while len(text) - start > limit:
        end = start + limit
        line_end = text.rfind("\n", start + limit // 2, end) + 1
        # before the space: byte-level tokenizers keep a space with the word that follows it
        space = text.rfind(" ", start + max(1, limit // 2), end)
        end = line_end if line_end > 0 else space if space > 0 else end
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def file_blocks(path: Path, limit: int) -> Iterator[str]:
    """Consecutive blocks of at most `limit` (>= 8) bytes of a UTF-8 file; invalid bytes become U+FFFD.

    They join to the text of the file (less a byte order mark); no character is cut in two.
    """
    with path.open("rb") as file:
        rest = file.read(limit).removeprefix(codecs.BOM_UTF8)
        while data := file.read(limit):
            rest += data
            while len(rest) > limit:
                end = _block_end(rest, limit)
                yield rest[:end].decode("utf-8", errors="replace")
                rest = rest[end:]
    if rest:
        yield rest.decode("utf-8", errors="replace")


def _block_end(data: bytes, limit: int) -> int:
    if (cut := data.rfind(b"\n", limit // 2, limit)) > 0:
        return cut + 1
    if (cut := data.rfind(b" ", limit // 2, limit)) > 0:
        return cut
    for end in range(limit, limit - 4, -1):
        if data[end] & 0xC0 != 0x80:  # not a continuation byte: a character starts here
            return end
    return limit  # not UTF-8 anyway
