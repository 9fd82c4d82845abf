from __future__ import annotations

import hashlib
import json
import random
from importlib.resources import files
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from ldm.convert.tokenizer import read_tokenizer, write_tokenizer
from ldm.text import clip_tokenizer, clip_vocabulary

SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def nasty() -> list[str]:
    """Texts that break tokenizers: 28 by hand, 300 by chance."""
    by_hand = [
        "", " ", "\t\n\r  ", "a photo of a cat", "A Photo Of A CAT!", "don't I'M we'll they've he'd it's 'tis",
        "hello!", "wow!!!", "1234567890 3.14 1e-5 ½ ² ٣ 四", "😀😃🇩🇪👨‍👩‍👧‍👦🏳️‍🌈",
        "一只红色的苹果 日本語 テスト 한국어", "Äpfel naïve café e\u0301 ﬁ ß İ Σς",
        "<|endoftext|>", "a <|endoftext|> b<|startoftext|>c", "<|ENDOFTEXT|> <|StartOfText|>", "<|endoftext",
        "</w> Ġ ▁ ##a", "a\x00b\x07c\x1b[0m\x7f", "\u200b\u200d\ufeff\u2028x\u00a0y\u3000z",
        "a_b-c/d\\e|f{g}[h](i)<j>@k#l$m%n^o&p*q+r=s~t`u", "word " * 200, "x" * 500, "!" * 100,
        "(masterpiece:1.2), ((best quality)), [ugly]", "url http://a.b/c?d=e&f=g",
        "ᚠᛇᚻ ਪੰਜਾਬੀ עברית العربية ไทย", "\ud7ff \ue000 \U0010ffff", "o͓̫̫̱͉̞͆̀ͨ̆ͭ ẗ̲̩̬",
    ]  # fmt: skip
    draw = random.Random(0)
    pieces = [*"abcXYZ019 !?.,'\"-\n\t", "'s", "'LL", "é", "ß", "中", "😀", "\u200d", "<|endoftext|>", "the ", "quick "]
    return by_hand + ["".join(draw.choices(pieces, k=draw.randint(1, 60))) for _ in range(300)]


@pytest.fixture(scope="module")
def theirs() -> CLIPTokenizer:
    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def ids(text: str, prompts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in Tokenizer.from_str(text).encode_batch(prompts)]


def test_the_vocabulary_is_the_one_that_openai_published() -> None:
    packed = (files("ldm") / "assets" / "clip" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    assert hashlib.sha256(packed).hexdigest().startswith("924691ac")
    vocabulary, merges = clip_vocabulary()
    assert (len(vocabulary), len(merges)) == (49408, 48894)
    # Ids that the papers' code and every model trained on it agree about.
    known = {"!": 0, "!</w>": 256, "a</w>": 320, "cat</w>": 2368, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in known} == known
    assert ids(clip_tokenizer(), ["a photo of a cat"]) == [[49406, 320, 1125, 539, 320, 2368, 49407]]


def test_tokens_of_328_nasty_texts_are_those_of_transformers(theirs: CLIPTokenizer) -> None:
    prompts = nasty()
    assert len(prompts) == 328
    assert ids(clip_tokenizer(), prompts) == theirs(prompts).input_ids


def old_folder(folder: Path, padding: str | dict[str, object]) -> None:
    """A tokenizer folder as SD 1.x and 2.x have it: vocab.json, merges.txt, and begin and end that are normalised."""
    vocabulary, merges = clip_vocabulary()
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special: dict[str, object] = {role: {"content": token, **flags} for role, token in SPECIAL.items()}
    special["pad_token"] = padding
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    typed = {role: {"__type": "AddedToken", **t} if isinstance(t, dict) else t for role, t in special.items()}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **typed}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("style", ["old", "old, padded by !", "new", "new, padded by !", "with a word of its own"])
def test_a_checkpoints_own_tokenizer_gives_the_tokens_of_transformers(
    theirs: CLIPTokenizer, tmp_path: Path, style: str
) -> None:
    folder = tmp_path / "tokenizer"
    vocabulary, merges = clip_vocabulary()
    if style.startswith("old"):
        old_folder(folder, "!" if "!" in style else "<|endoftext|>")
    elif style.startswith("new"):
        padding = "!" if "!" in style else "<|endoftext|>"
        CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=77).save_pretrained(folder)
    else:
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
        tokenizer.add_tokens(["<my-cat>"])
        tokenizer.save_pretrained(folder)
    reference = CLIPTokenizer.from_pretrained(folder)
    prompts = [*nasty(), "a <my-cat> on <My-Cat>'s mat"]
    text, padding_id = read_tokenizer(folder)
    assert padding_id == reference.pad_token_id
    assert ids(text, prompts) == reference(prompts).input_ids

    write_tokenizer(tmp_path / "again", text, padding_id)
    again = CLIPTokenizer.from_pretrained(tmp_path / "again")
    assert again.pad_token_id == padding_id
    assert again(prompts).input_ids == reference(prompts).input_ids
    assert again.model_max_length == 77


def test_a_vocabulary_that_is_not_clips_is_refused(tmp_path: Path) -> None:
    (tmp_path / "poor").mkdir()
    (tmp_path / "poor/vocab.json").write_text('{"a": 0}')
    (tmp_path / "poor/merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"its first token '<\|startoftext\|>' is not in its vocabulary"):
        read_tokenizer(tmp_path / "poor")
    with pytest.raises(ValueError, match=r"holds neither tokenizer\.json nor"):
        read_tokenizer(tmp_path)
    old_folder(tmp_path / "odd", "<pad>")
    with pytest.raises(ValueError, match="padding token '<pad>' is not in its vocabulary"):
        read_tokenizer(tmp_path / "odd")
