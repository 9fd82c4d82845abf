r"""Makes the emoji shards from npm packages; a script for the developer's machine, nothing imports it.

    npm install @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6 \
        @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0 openmoji@17.0.0
    pip install resvg-py==0.5.0
    python -m tests.tools.make_emoji node_modules ldm/assets/emoji_data contact_sheet.png

Drawings are rasterised at 512 pixels and reduced, composited on white, stored as WebP. Emojibase's label and tags
are joined by hexcode without FE0F. Splits hang on a hash of the concept alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ldm.data.emoji import FOLDER, HANDS, STYLES
from ldm.data.shards import write_atomically, write_shard

SIZE = 128
QUALITY = 90
FLAGS, COMPONENTS = 9, 2  # emojibase groups that are left out; components are skin tones and hair
# Labels that take no article, and the concepts of the smaller data sets: 200 common ones that all hands drew, and of
# these the 48 that a CPU learns to draw in an hour.
WORDS: dict[str, list[str]] = json.loads((FOLDER / "words.json").read_text())


@dataclass(frozen=True)
class Emoji:
    """One concept's drawing by one style."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    style: str

    @property
    def key(self) -> str:
        """Unique, without dots or blanks."""
        return f"{self.hexcode}-{self.style.replace(' ', '').lower()}"

    @property
    def concept(self) -> str:
        """What is drawn: without man, woman, person, and where they look; a family is a family, as hands draw it."""
        label = re.sub(r"^(family|kiss|couple with heart)\b.*", r"\1", self.label).removesuffix(" facing right")
        label = re.sub(r"^(Mrs\.|Mx|Santa) Claus$", "Claus", label).replace("older ", "old ")
        label = re.sub(r"\bmer(man|maid|person)\b", "merperson", label)
        words = re.sub(r"\b(man|men|woman|women|person|people)\b[’']?s?", "", label)
        return re.sub(r"\s+", " ", words).strip(" :,") or "person"


def fraction(text: str) -> float:
    """A text's place in [0, 1), by its sha256: what splits and choices hang on."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def clean(label: str) -> str:
    """Emojibase's label as one would write it: "man: red hair" → "man with red hair", "locked" → "locked padlock"."""
    label = {"locked": "locked padlock", "unlocked": "unlocked padlock"}.get(label, label)
    label = label.replace("’", "'").replace("“", "").replace("”", "")
    label = re.sub(r"^(man|woman|person): (.*hair|beard)$", r"\1 with \2", label)
    label = re.sub(r"^(man|woman|person): bald$", r"bald \1", label)
    label = re.sub(r"^(family|kiss|couple with heart): ", r"\1 of ", label)
    return label.replace(": facing", " facing").replace("keycap: ", "keycap ")


def article(label: str) -> str:
    """The label with a or an before it, where it is one thing that can be counted."""
    if label in WORDS["plural"] or label in WORDS["mass"] or label[0].isdigit():
        return label
    return f"{'an' if label[0].lower() in 'aeiou' and not label.startswith(('uni', 'ewe', 'one')) else 'a'} {label}"


def captions(emoji: Emoji) -> list[str]:
    """Seven fixed variants, the tags in them chosen by key; the first has none and is the one for evaluation."""
    label, style, thing = emoji.label, emoji.style, article(emoji.label)
    tags = sorted((t for t in emoji.tags if t not in label), key=lambda tag: fraction(emoji.key + tag))
    some = ", ".join(tags[:3]) or label
    return [
        f"{thing}, {style} style",
        f"{article(style)} of {thing}: {some}",
        f"{label}, {style}",
        f"{style} {label}",
        f"{label} in {style} style, {tags[0] if tags else label}",
        f"{tags[-1] if tags else label}, {thing}, {style} style",
        thing,
    ]


def load(modules: Path) -> tuple[list[Emoji], dict[str, Any]]:
    """Every drawing with its source: bytes of a WebP or an SVG."""
    data = json.loads((modules / "emojibase-data/en/data.json").read_text())
    svgs = {style: _iconify(modules / "@iconify-json" / package) for style, package in
            (("noto", "noto"), ("twemoji", "twemoji"), ("fluent flat", "fluent-emoji-flat"))}  # fmt: skip
    flat_3d = {_plain(p.stem): p for p in (modules / "@lobehub/fluent-emoji-3d/assets").glob("*.webp")}
    openmoji = {_plain(p.stem): p for p in (modules / "openmoji/color/svg").glob("*.svg")}
    found: list[Emoji] = []
    sources: dict[str, Any] = {}
    for entry in data:
        if entry.get("group") in (None, FLAGS, COMPONENTS):
            continue
        code = _plain(entry["hexcode"])
        drawings: dict[str, Any] = {style: table[code] for style, table in svgs.items() if code in table}
        if "fluent flat" in drawings and code in flat_3d:
            drawings["fluent 3D"] = flat_3d[code]
        if code in openmoji:
            drawings["openmoji"] = openmoji[code]
        for style, source in drawings.items():
            emoji = Emoji(code, clean(entry["label"]), tuple(entry.get("tags", ())), style)
            found.append(emoji)
            sources[emoji.key] = source
    return sorted(found, key=lambda e: e.key), sources


def _plain(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def _iconify(folder: Path) -> dict[str, str]:
    """SVG by hexcode. ``chars.json`` names the icon of each code point sequence; names may be aliases."""
    icons = json.loads((folder / "icons.json").read_text())
    chars = json.loads((folder / "chars.json").read_text())
    result = {}
    for code, name in chars.items():
        icon = icons["icons"].get(name)
        while icon is None and name in icons.get("aliases", {}):
            alias = icons["aliases"][name]
            # A mirrored or turned alias is another drawing: left out rather than drawn wrongly.
            if set(alias) - {"parent"}:
                break
            name = alias["parent"]
            icon = icons["icons"].get(name)
        if icon is not None:
            width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
            left, top = icon.get("left", 0), icon.get("top", 0)
            result[_plain(code)] = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
            )
    return result


def rasterise(source: str | Path) -> Image.Image:
    """A drawing on white, 128×128."""
    if isinstance(source, Path) and source.suffix == ".webp":
        image = Image.open(source).convert("RGBA")
    else:
        import resvg_py  # here, so that captions and splits can be checked without it

        svg = source if isinstance(source, str) else source.read_text()
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=512, height=512))
        image = Image.open(io.BytesIO(png)).convert("RGBA")
    if image.width != image.height:
        side = max(image.size)
        square = Image.new("RGBA", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    # Composited first: resampling transparent pixels would mix in colours that nobody sees.
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return white.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def split_emoji(emoji: list[Emoji]) -> dict[str, list[str]]:
    """3 % of concepts held out; then 5 % of (concept, hand) pairs whose concept another hand keeps."""
    result: dict[str, list[str]] = {"train": [], "heldout_pairs": [], "heldout_concepts": []}
    held = _held_pairs(emoji, 0.05, "pair")
    for e in emoji:
        if fraction("concept " + e.concept) < 0.03:
            result["heldout_concepts"].append(e.key)
        else:
            result["heldout_pairs" if (e.concept, HANDS[e.style]) in held else "train"].append(e.key)
    return result


def split_emoji200(emoji: list[Emoji]) -> dict[str, list[str]]:
    """The 200 concepts that all hands drew; 10 % of the pairs held out."""
    wanted = WORDS["emoji200"]
    chosen = [e for e in emoji if e.label in wanted]
    complete = [name for name in wanted if sum(e.label == name for e in chosen) == len(STYLES)]
    if len(set(complete)) != 200 or len(wanted) != 200:
        raise ValueError(f"{len(wanted)} named, {len(set(complete))} complete: {sorted(set(wanted) - set(complete))}")
    result: dict[str, list[str]] = {"train": [], "heldout_pairs": []}
    held = _held_pairs(chosen, 0.10, "pair200")
    for e in chosen:
        result["heldout_pairs" if (e.concept, HANDS[e.style]) in held else "train"].append(e.key)
    return result


def split_emoji48(emoji: list[Emoji], larger: dict[str, list[str]]) -> dict[str, list[str]]:
    """48 concepts of emoji200, split as they are there: a model of the one may begin a training of the other."""
    keys = {e.key for e in emoji if e.label in WORDS["emoji48"]}
    return {split: [key for key in listed if key in keys] for split, listed in larger.items()}


def split_openmoji(emoji: list[Emoji]) -> dict[str, list[str]]:
    """The same held-out concepts as in the full set; of the rest, which other hands drew, 10 % are held-out pairs."""
    result: dict[str, list[str]] = {"train": [], "heldout_pairs": [], "heldout_concepts": []}
    for e in emoji:
        pair = fraction("openmoji pair " + e.concept) < 0.10
        concept = fraction("concept " + e.concept) < 0.03
        result["heldout_concepts" if concept else "heldout_pairs" if pair else "train"].append(e.key)
    return result


def _held_pairs(emoji: list[Emoji], rate: float, salt: str) -> set[tuple[str, str]]:
    """Pairs of concept and hand to hold out, at most one a concept, the concept still seen by another hand."""
    hands: dict[str, set[str]] = defaultdict(set)
    for e in emoji:
        hands[e.concept].add(HANDS[e.style])
    held = set()
    for concept, drawn in hands.items():
        u = fraction(f"{salt} {concept}")
        if len(drawn) > 1 and u < rate * len(drawn):
            held.add((concept, sorted(drawn)[int(u / rate)]))
    return held


def contact_sheet(emoji: list[Emoji], images: dict[str, Image.Image], path: Path) -> None:
    """Forty concepts, their styles side by side with the first caption below: to check by eye that they belong."""
    by_label: dict[str, list[Emoji]] = defaultdict(list)
    for e in emoji:
        by_label[e.label].append(e)
    labels = sorted(by_label, key=fraction)[:40]
    across, cell = 2, (SIZE + 8, SIZE + 20)
    sheet = Image.new("RGB", (cell[0] * 5 * across, cell[1] * 20), "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels):
        for j, e in enumerate(sorted(by_label[label], key=lambda e: [*STYLES, "openmoji"].index(e.style))):
            x, y = cell[0] * (5 * (i % across) + j), cell[1] * (i // across)
            sheet.paste(images[e.key], (x, y))
            draw.text((x, y + SIZE + 2), captions(e)[0][:24], fill="black")
    sheet.save(path)


def main(modules: Path, out: Path, sheet: Path) -> None:
    """Make shards, splits and the contact sheet."""
    emoji, sources = load(modules)
    images = {e.key: rasterise(sources[e.key]) for e in emoji}
    # A few drawings serve two concepts (fluent's cat face and grinning cat): the second would leak across splits.
    first: dict[tuple[str, bytes], str] = {}
    emoji = [e for e in emoji if first.setdefault((e.style, images[e.key].tobytes()), e.concept) == e.concept]
    out.mkdir(parents=True, exist_ok=True)
    for style in (*STYLES, "openmoji"):
        samples = []
        for e in (e for e in emoji if e.style == style):
            buffer = io.BytesIO()
            images[e.key].save(buffer, "WEBP", quality=QUALITY, method=6)
            meta = {"hexcode": e.hexcode, "label": e.label, "concept": e.concept, "style": style,
                    "hand": HANDS.get(style, style), "tags": e.tags, "captions": captions(e)}  # fmt: skip
            members = {"webp": buffer.getvalue(), "txt": captions(e)[0].encode()}
            samples.append((e.key, {**members, "json": json.dumps(meta, ensure_ascii=False).encode()}))
        write_shard(out / f"{style.replace(' ', '').lower()}.tar", samples)
    drawn = [e for e in emoji if e.style in STYLES]
    emoji200 = split_emoji200(drawn)
    sets = {
        "emoji": split_emoji(drawn),
        "emoji200": emoji200,
        "emoji48": split_emoji48(drawn, emoji200),
        "openmoji": split_openmoji([e for e in emoji if e.style == "openmoji"]),
    }
    write_atomically(out / "splits.json", json.dumps(sets, indent=0).encode())
    contact_sheet(emoji, images, sheet)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
