"""CLIP's tokenizer: text → byte pairs (Radford et al., 2103.00020, §2.4), from the vocabulary that comes with us.

Text is brought to NFC, its blanks are joined, its letters made small; it falls into words, digits and runs of signs;
each is spelt in bytes, and the byte pairs of a list are merged, the earliest of the list first.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 48894  # the rest of the vocabulary's file is no part of CLIP
# Begin, end, English endings, words, single digits, runs of signs; what is between them is dropped.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


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


def make_tokenizer(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], special: Sequence[str | AddedToken] = ()
) -> str:
    """A tokenizers' JSON of CLIP's kind.

    Args:
        vocabulary: ids by token.
        merges: pairs, the first to merge first.
        special: tokens that are found in the text before anything else, beside begin and end; or other flags for these.

    Raises:
        ValueError: if begin or end are not in the vocabulary.
    """
    for token in (BEGIN, END):
        if token not in vocabulary:
            raise ValueError(f"a vocabulary of {len(vocabulary)} tokens without {token} is not CLIP's")
    model = models.BPE(
        vocab=dict(vocabulary),
        merges=list(merges),
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (BEGIN, vocabulary[BEGIN]), trim_offsets=False, add_prefix_space=False
    )
    own = {str(token.content if isinstance(token, AddedToken) else token) for token in special}
    tokenizer.add_special_tokens([*(token for token in (BEGIN, END) if token not in own), *special])
    return tokenizer.to_str()


@lru_cache(maxsize=1)
def clip_tokenizer() -> str:
    """CLIP's tokenizer as a tokenizers' JSON, from the vocabulary that comes with the package."""
    return make_tokenizer(*clip_vocabulary())
