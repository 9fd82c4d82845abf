"""The bundled emoji keep the promises of their splits."""

from collections import Counter

import pytest

from ldm.data import HANDS, STYLES, Sample, ShardDataset, decode_image, emoji_dataset
from ldm.data.emoji import FOLDER, splits
from tests.tools import make_emoji

Samples = dict[str, list[Sample]]


def read(name: str) -> Samples:
    sets = {split: emoji_dataset(name, split) for split in splits()[name]}
    return {split: [data[i] for i in range(len(data))] for split, data in sets.items()}


@pytest.fixture(scope="module")
def emoji() -> Samples:
    return read("emoji")


@pytest.fixture(scope="module")
def emoji200() -> Samples:
    return read("emoji200")


def pairs(samples: list[Sample]) -> set[tuple[str, str]]:
    return {(sample.meta["concept"], sample.meta["hand"]) for sample in samples}


def concepts(samples: list[Sample]) -> set[str]:
    return {sample.meta["concept"] for sample in samples}


def test_four_styles_by_three_hands(emoji: Samples) -> None:
    everything = [sample for split in emoji.values() for sample in split]
    assert {sample.meta["style"] for sample in everything} == set(STYLES)
    assert all(HANDS[sample.meta["style"]] == sample.meta["hand"] for sample in everything)
    assert 6300 < len(everything) < 6600
    assert len({sample.key for sample in everything}) == len(everything)


def test_held_out_concepts_are_never_trained_on(emoji: Samples) -> None:
    assert not concepts(emoji["heldout_concepts"]) & concepts(emoji["train"] + emoji["heldout_pairs"])
    total = len(concepts(emoji["train"]) | concepts(emoji["heldout_concepts"]))
    assert 0.02 < len(concepts(emoji["heldout_concepts"])) / total < 0.04


@pytest.mark.parametrize("name", ["emoji", "emoji200"])
def test_of_a_held_out_pair_the_concept_is_seen_but_not_by_that_hand(
    name: str, emoji: Samples, emoji200: Samples
) -> None:
    data = {"emoji": emoji, "emoji200": emoji200}[name]
    held, seen = pairs(data["heldout_pairs"]), pairs(data["train"])
    assert not held & seen
    assert concepts(data["heldout_pairs"]) <= concepts(data["train"])
    assert max(Counter(concept for concept, _ in held).values()) == 1  # at most one hand of a concept
    share = len(held) / len(held | seen)
    low, high = (0.035, 0.065) if name == "emoji" else (0.07, 0.13)
    assert low < share < high


def test_no_drawing_lies_on_both_sides_of_a_split(emoji: Samples) -> None:
    trained = {sample.image: sample.key for sample in emoji["train"]}
    held = emoji["heldout_pairs"] + emoji["heldout_concepts"]
    assert {sample.key: trained[sample.image] for sample in held if sample.image in trained} == {}


def test_labels_that_differ_by_person_or_direction_are_one_concept(emoji: Samples) -> None:
    by_label = {sample.meta["label"]: sample.meta["concept"] for split in emoji.values() for sample in split}
    assert by_label["man running"] == by_label["woman running"] == by_label["person running"]
    assert by_label["man farmer"] == by_label["farmer"]
    right = next(label for label in by_label if label.startswith("person running") and label.endswith("facing right"))
    assert by_label[right] == by_label["person running"]


def test_emoji200_has_200_concepts_in_all_four_styles(emoji200: Samples) -> None:
    everything = emoji200["train"] + emoji200["heldout_pairs"]
    counts = Counter(sample.meta["concept"] for sample in everything)
    assert len(counts) == 200
    assert set(counts.values()) == {4}


def test_emoji48_is_a_part_of_emoji200_split_alike(emoji200: Samples) -> None:
    part = read("emoji48")
    assert len({s.meta["concept"] for split in part.values() for s in split}) == 48
    for split in ("train", "heldout_pairs"):
        assert {s.key for s in part[split]} <= {s.key for s in emoji200[split]}
    assert sum(len(split) for split in part.values()) == 4 * 48


def test_a_sample_has_its_captions_and_the_first_is_without_tags(emoji200: Samples) -> None:
    for sample in emoji200["train"]:
        variants = sample.meta["captions"]
        assert sample.caption == variants[0]
        assert len(variants) >= 5
        assert variants[0].endswith(f"{sample.meta['label']}, {sample.meta['style']} style")


def test_images_are_128_squared_on_white(emoji200: Samples) -> None:
    for sample in emoji200["heldout_pairs"]:
        image = decode_image(sample.image)
        assert image.size == (128, 128)
        corners = [image.getpixel((x, y)) for x in (0, 127) for y in (0, 127)]
        assert max(min(corner) for corner in corners if isinstance(corner, tuple)) > 240


def test_openmoji_is_in_no_other_set(emoji: Samples) -> None:
    held_back = read("openmoji")
    assert {sample.meta["style"] for split in held_back.values() for sample in split} == {"openmoji"}
    assert not concepts(held_back["train"]) & concepts(emoji["heldout_concepts"])


def test_captions_concepts_and_splits_are_those_that_the_script_makes() -> None:
    data = ShardDataset(FOLDER)
    everything = [data[i] for i in range(len(data))]
    emoji = [make_emoji.Emoji(*(s.meta[k] for k in ("hexcode", "label", "tags", "style"))) for s in everything]
    for sample, e in zip(everything, emoji, strict=True):
        made = {"captions": make_emoji.captions(e), "concept": e.concept}
        assert (e.key, made) == (sample.key, {key: sample.meta[key] for key in made})
    drawn = [e for e in emoji if e.style in STYLES]
    emoji200 = make_emoji.split_emoji200(drawn)
    assert splits() == {
        "emoji": make_emoji.split_emoji(drawn),
        "emoji200": emoji200,
        "emoji48": make_emoji.split_emoji48(drawn, emoji200),
        "openmoji": make_emoji.split_openmoji([e for e in emoji if e.style == "openmoji"]),
    }


def test_unknown_names_and_splits_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="emoji200"):
        emoji_dataset("emojis")
    with pytest.raises(ValueError, match="heldout_pairs"):
        emoji_dataset("emoji200", "test")


def test_favouring_a_set_repeats_what_it_trains_on_and_leaves_out_all_that_is_held_out() -> None:
    plain, mixed = emoji_dataset("emoji", "train"), emoji_dataset("emoji", "train", favour="emoji200", times=3)
    held = {key for split in ("heldout_pairs", "heldout_concepts") for key in splits()["emoji"][split]}
    held |= set(splits()["emoji200"]["heldout_pairs"])
    assert not held & set(mixed.keys)
    often = set(splits()["emoji200"]["train"]) & set(plain.keys)
    counts = Counter(mixed.keys)
    assert {key for key, count in counts.items() if count == 3} == often
    assert {key for key, count in counts.items() if count == 1} == set(plain.keys) - often - held
    assert mixed[1].key == mixed.keys[1]
    wide = Counter(emoji_dataset("emoji", "all", favour="emoji200", times=3).keys)
    every = {key for keys in splits()["emoji"].values() for key in keys}
    assert set(wide) == every - set(splits()["emoji200"]["heldout_pairs"])
    assert {key for key, count in wide.items() if count == 3} == set(splits()["emoji200"]["train"])
    with pytest.raises(ValueError, match="times=0 must be at least 1"):
        emoji_dataset("emoji", "train", "emoji200", 0)
    with pytest.raises(ValueError, match="'emoji9' is unknown"):
        emoji_dataset("emoji", "train", "emoji9")


def test_concepts_of_another_set_are_kept_in_the_styles_of_this_one() -> None:
    known = {sample.meta["concept"] for sample in emoji_dataset("emoji48")}
    kept = list(emoji_dataset("openmoji", concepts="emoji48"))
    assert {sample.meta["style"] for sample in kept} == {"openmoji"}
    assert {sample.meta["concept"] for sample in kept} < known
    left = [sample for split in ("heldout_pairs", "heldout_concepts") for sample in emoji_dataset("openmoji", split)]
    assert len(kept) + sum(sample.meta["concept"] in known for sample in left) == len(known) == 48
    with pytest.raises(ValueError, match="'emoji9' is unknown"):
        emoji_dataset("openmoji", concepts="emoji9")
