"""The tokenizer folder of a checkpoint ↔ our tokenizers' JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ldm.convert.tensors import read_json
from ldm.text.clip import BEGIN, END, make_tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds one in either of the two forms."""
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


def read_tokenizer(folder: Path) -> tuple[str, int]:
    """A checkpoint's own tokenizer as a tokenizers' JSON, and the id of its padding.

    Raises:
        ValueError: if it is none of CLIP's.
    """
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt; it is incomplete")
    flags: dict[str, AddedToken] = {}
    if (folder / "tokenizer.json").is_file():
        whole = read_json(folder / "tokenizer.json")
        vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
        added = {token["content"]: token for token in whole.get("added_tokens", [])}
    else:
        vocabulary = read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        added = {}
    pairs = [(left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in merges)]
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    added |= {token["content"]: token | {"id": int(i)} for i, token in settings.get("added_tokens_decoder", {}).items()}
    if (folder / "added_tokens.json").is_file():
        added |= {t: {"id": i} for t, i in read_json(folder / "added_tokens.json").items() if t not in added}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(role)
        content = token["content"] if isinstance(token, dict) else token
        if content is not None:
            flags[content] = _added(content, added.get(content) or (token if isinstance(token, dict) else {}))
    later = sorted((entry["id"], content) for content, entry in added.items() if content not in vocabulary)
    flags |= {content: _added(content, added[content]) for _, content in later}
    try:
        text = make_tokenizer(vocabulary, pairs, list(flags.values()))
    except Exception as error:  # tokenizers raises bare exceptions for a vocabulary and merges that do not fit
        raise ValueError(f"{folder} holds no tokenizer of CLIP's kind ({error})") from error
    if [len(vocabulary) + i for i in range(len(later))] != [i for i, _ in later]:
        raise ValueError(f"{folder}: its added tokens {later[:5]} do not follow its {len(vocabulary)} others")
    pad = settings.get("pad_token") or END
    content = pad["content"] if isinstance(pad, dict) else pad
    if content not in vocabulary:
        raise ValueError(f"{folder}: its padding token {content!r} is not in its vocabulary")
    return text, vocabulary[content]


def _added(content: str, flags: Mapping[str, Any]) -> AddedToken:
    names = ("lstrip", "rstrip", "single_word", "normalized")
    return AddedToken(content, special=True, **{name: bool(flags.get(name, False)) for name in names})


def write_tokenizer(folder: Path, text: str, pad_token: int) -> None:
    """Write a tokenizer as transformers keeps one.

    Raises:
        ValueError: if it is none of CLIP's kind.
    """
    whole = json.loads(text)
    model, added = whole["model"], {token["content"]: token for token in whole["added_tokens"]}
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>" or not {BEGIN, END} <= added.keys():
        raise ValueError("its tokenizer is not CLIP's byte pairs, and a diffusers folder of SD holds no other")
    vocabulary: dict[str, int] = model["vocab"]
    folder.mkdir()
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *pairs, ""]))
    padding = next(token for token, i in vocabulary.items() if i == pad_token)
    tokens = {role: added[token] for role, token in (("bos_token", BEGIN), ("eos_token", END), ("unk_token", END))}
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word")
    special: dict[str, Any] = {role: {key: token[key] for key in keys} for role, token in tokens.items()}
    # transformers takes every padding token for a special one: a "!" in a prompt to SD 2.x then is padding.
    special["pad_token"] = {key: added[padding][key] for key in keys} if padding in added else padding
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: token[key] for key in (*keys, "special")} for token in added.values()
    }
    named = {role: token["content"] if isinstance(token, dict) else token for role, token in special.items()}
    _write(folder / "tokenizer_config.json", json.dumps(settings | named, indent=2))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
