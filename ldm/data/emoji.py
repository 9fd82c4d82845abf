"""The emoji data that come with the package: 128×128, four art styles, and a fifth held back.

Reading them is :func:`emoji_dataset`. How they were made is ``tests/tools/make_emoji.py``.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ldm.data.dataset import ShardDataset

FOLDER = Path(str(files("ldm") / "assets" / "emoji_data"))
STYLES = ("noto", "twemoji", "fluent flat", "fluent 3D")
#: Who drew a style: fluent flat and fluent 3D are the same drawings, so there are three hands.
HANDS = {"noto": "noto", "twemoji": "twemoji", "fluent flat": "fluent", "fluent 3D": "fluent"}

#: A data set that is a part of another, split as it is there; its pictures are scored against the whole.
PART_OF = {"emoji48": "emoji200"}


def splits() -> dict[str, dict[str, list[str]]]:
    """Keys by data set (emoji, emoji200, emoji48, openmoji) and split (train, heldout_pairs, heldout_concepts)."""
    loaded: dict[str, Any] = json.loads((FOLDER / "splits.json").read_text())
    return loaded


def emoji_dataset(
    name: str = "emoji200",
    split: str = "train",  # "all": every split together
    favour: str | None = None,  # another set, for a training that is to draw that one best
    times: int = 1,  # how often it trains on them; what it holds out is left out
    concepts: str | None = None,  # another set: what it trains on is kept, in the styles of this one
) -> ShardDataset:
    """The samples of a data set and split.

    Raises:
        ValueError: for a name or split that is not there, and for ``times`` below 1.
    """
    sets = splits()
    for each in (name, favour or name, concepts or name):
        if each not in sets:
            raise ValueError(f"emoji data set {each!r} is unknown; choose one of {', '.join(sets)}")
    named = {**sets[name], "all": [key for keys in sets[name].values() for key in keys]}
    if split not in named:
        raise ValueError(f"split {split!r} of {name} is unknown; choose one of {', '.join(named)}")
    if times < 1:
        raise ValueError(f"times={times} must be at least 1; 1 favours no picture")
    pattern = "openmoji*.tar" if name == "openmoji" else "[!o]*.tar"
    keys = named[split]  # CODEPOINTS-STYLE
    if concepts is not None:
        known = {key.rsplit("-", 1)[0] for key in sets[concepts]["train"]}
        keys = [key for key in keys if key.rsplit("-", 1)[0] in known]
    samples = ShardDataset(sorted(FOLDER.glob(pattern)), keys=keys)
    if favour is None:
        return samples
    often, never = set(sets[favour].pop("train")), {key for keys in sets[favour].values() for key in keys}
    counts = [0 if key in never else times if key in often else 1 for key in samples.keys]
    return samples.subset([number for number, count in enumerate(counts) for _ in range(count)])
