"""CLIP's tokenizer: text → byte pairs (Radford et al., 2103.00020, §2.4), from the vocabulary that comes with us.

Text is brought to NFC, its blanks are joined, its letters made small; it falls into words, digits and runs of signs;
each is spelt in bytes, and the byte pairs of a list are merged, the earliest of the list first.
"""

import gzip
from functools import lru_cache
from importlib.resources import files
from typing import Any

from transformers import CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 48894  # the rest of the vocabulary's file is no part of CLIP


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens with their ids (49,408 of them) and the pairs to merge, from ``assets/clip`` (MIT, OpenAI).

    Ids 0 to 255 are the bytes, the printable ones first; then the bytes at the end of a word, the merged pairs in
    order, begin and end.
    """
    packed = (files("ldm") / "assets" / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : NUM_MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # A byte that prints is written as itself, the others as the characters from 256 on.
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [f"{letter}</w>" for letter in letters] + [left + right for left, right in merges] + [BEGIN, END]
    return {token: i for i, token in enumerate(tokens)}, merges


@lru_cache(maxsize=1)
def clip_tokenizer() -> str:
    """CLIP's tokenizer as a tokenizers' JSON, as transformers builds it from the vocabulary that comes with us."""
    vocabulary, merges = clip_vocabulary()
    pairs: Any = merges  # transformers takes pairs as well as what its types say
    return CLIPTokenizer(vocab=vocabulary, merges=pairs).backend_tokenizer.to_str()
