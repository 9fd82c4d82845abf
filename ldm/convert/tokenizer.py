"""The tokenizer folder of a checkpoint ↔ our tokenizers' JSON."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import CLIPTokenizer

from ldm.text.clip import BEGIN, END


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds one in either of the two forms."""
    return (folder / "tokenizer.json").is_file() or all((folder / n).is_file() for n in ("vocab.json", "merges.txt"))


def read_tokenizer(folder: Path) -> tuple[str, int]:
    """A checkpoint's own tokenizer as JSON, and the id of its padding; ValueError if it is none of CLIP's."""
    if not has_tokenizer(folder):
        raise ValueError(f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt; it is incomplete")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        text = tokenizer.backend_tokenizer.to_str()
        vocabulary, padding = json.loads(text)["model"]["vocab"], tokenizer.pad_token or END
    except Exception as error:  # tokenizers raises bare exceptions for a vocabulary and merges that do not fit
        raise ValueError(f"{folder} holds no tokenizer of CLIP's kind ({' '.join(str(error).split())})") from error
    for role, token in (("first", BEGIN), ("last", END), ("padding", padding)):
        if token not in vocabulary:
            raise ValueError(f"{folder}: its {role} token {token!r} is not in its vocabulary; it is none of CLIP's")
    return text, vocabulary[padding]


def write_tokenizer(folder: Path, text: str, pad_token: int) -> None:
    """Write a tokenizer as transformers keeps one; ValueError if it is none of CLIP's kind."""
    whole = json.loads(text)
    model, tokens = whole["model"], [{k: v for k, v in token.items() if k != "id"} for token in whole["added_tokens"]]
    added = {token["content"]: AddedToken(**token) for token in tokens}
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>" or not {BEGIN, END} <= added.keys():
        raise ValueError("its tokenizer is not CLIP's byte pairs, and a diffusers folder of SD holds no other")
    # transformers takes every padding token for a special one: a "!" in a prompt to SD 2.x then is padding.
    padding = next(token for token, i in model["vocab"].items() if i == pad_token)
    roles = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": padding}
    special = {role: added.get(token, token) for role, token in roles.items()}
    pairs: Any = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    theirs = CLIPTokenizer(vocab=model["vocab"], merges=pairs, model_max_length=77, **special)
    theirs.add_tokens(list(added.values()))
    theirs.save_pretrained(folder)
    Tokenizer.from_str(text).model.save(str(folder))  # vocab.json and merges.txt, for older releases
