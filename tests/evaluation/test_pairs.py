"""The score: known answers on made-up features, sensible ones on real images, and models that cheat."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.data import HANDS, STYLES, captions, decode_image, emoji_dataset, to_tensor
from ldm.data.emoji import splits
from ldm.evaluation import Drawing, Judge, evaluate_pairs
from ldm.evaluation.features import EfficientNetLite0, Features
from ldm.evaluation.model import pairs_of
from ldm.evaluation.pairs import PairScorer, RealImages, StyleProbe, hash_order, load_real, training_choice
from ldm.evaluation.scores import METRICS, PairScores
from ldm.randomness import normal
from ldm.samples import Samples

HELDOUT = splits()["emoji200"]["heldout_pairs"]

# ------------------------------------------------------------------------------------------ made-up features


def made_up(num_concepts: int = 220) -> RealImages:
    """Every concept by every style: pooled features are an axis of its own, texture one of the style's."""
    concepts = [f"c{i}" for i in range(num_concepts) for _ in STYLES]
    styles = list(STYLES) * num_concepts
    pooled = torch.eye(num_concepts).repeat_interleave(len(STYLES), 0) + 0.01 * normal(0, "a", 0, (len(concepts), 1))
    texture = torch.eye(len(STYLES)).repeat(num_concepts, 1) + 0.1 * normal(0, "b", 0, (len(concepts), len(STYLES)))
    keys = [f"{c}-{s}" for c, s in zip(concepts, styles, strict=True)]
    return RealImages(Features(pooled, texture), keys, concepts, styles, keys, torch.ones(len(keys), dtype=torch.bool))


@pytest.fixture(scope="module")
def made_up_scorer(network: EfficientNetLite0) -> PairScorer:
    return PairScorer("made up", network, made_up())


def test_perfect_features_score_one_and_every_concept_has_two_hundred_candidates(made_up_scorer: PairScorer) -> None:
    scores = made_up_scorer.reference(made_up_scorer.real.keys)
    assert {name: figure.value for name, figure in scores.figures().items()} == dict.fromkeys(METRICS, 1.0)
    assert scores.num_candidates.unique().tolist() == [200]
    assert scores.chance() == pytest.approx([1 / 200, 1 / 40, 1 / 4, 1 / 800])


def test_a_wrong_concept_and_a_wrong_style_are_told_apart(made_up_scorer: PairScorer) -> None:
    real = made_up_scorer.real.features
    # c0 in style 0, four times: as it is; in style 1; c1 instead; c1 in style 1.
    features = Features(real.pooled[[0, 1, 4, 5]], real.texture[[0, 1, 4, 5]])
    scores = made_up_scorer.score(features, ["c0"] * 4, [STYLES[0]] * 4)
    assert scores.predicted_styles == [STYLES[0], STYLES[1], STYLES[0], STYLES[1]]
    assert scores.nearest == ["c0", "c0", "c1", "c1"]
    assert scores.columns().T[[0, 2, 3]].tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]]


def test_images_by_the_same_hand_are_no_help(network: EfficientNetLite0) -> None:
    real = made_up(8)
    # c0 by the others is moved far from everything: a fluent c0 then finds only itself and the other fluent c0.
    others = [i for i, key in enumerate(real.keys) if key.startswith("c0-") and HANDS[real.styles[i]] != "fluent"]
    real.features.pooled[others] *= -5
    table = PairScorer("made up", network, real).reference([f"c0-{STYLES[2]}", f"c0-{STYLES[3]}"]).table()
    assert [row["rank"] for row in table] == [8, 8]  # the last of all


def test_a_featureless_picture_wins_no_concept(made_up_scorer: PairScorer) -> None:
    centre = made_up_scorer.real.features.pooled.mean(0, keepdim=True)  # as near to all: nothing but ties
    scores = made_up_scorer.score(Features(centre, made_up_scorer.real.features.texture[:1]), ["c0"], [STYLES[0]])
    assert scores.columns()[0, METRICS.index("concept R@5")] == 0


def test_scores_do_not_depend_on_their_neighbours(made_up_scorer: PairScorer) -> None:
    keys = made_up_scorer.real.keys[::37]
    together = made_up_scorer.reference(keys)
    alone = [made_up_scorer.reference([key]).table()[0] for key in keys]
    assert together.table() == alone


@pytest.mark.parametrize(
    ("concepts", "styles", "message"),
    [
        (["c0", "c1"], [STYLES[0]], "give one of each"),
        (["dodo"], [STYLES[0]], "'dodo' was drawn by no other hand"),
        (["c0"], ["cubist"], "choose one of noto"),
    ],
)
def test_invalid_requests_are_refused(
    made_up_scorer: PairScorer, concepts: list[str], styles: list[str], message: str
) -> None:
    features = Features(made_up_scorer.real.features.pooled[:1], made_up_scorer.real.features.texture[:1])
    with pytest.raises(ValueError, match=message):
        made_up_scorer.score(features, concepts, styles)


def test_a_data_set_without_several_hands_is_refused(network: EfficientNetLite0) -> None:
    with pytest.raises(ValueError, match="take emoji200 or emoji"):
        load_real("openmoji", network)


def test_the_probe_finds_the_maximum_of_its_own_likelihood() -> None:
    x = normal(0, "x", 0, (400, 5))
    labels = x[:, :3].argmax(1)
    probe = StyleProbe(x, labels, 3)
    z = (x - probe.mean) / probe.std
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(z @ weight + bias, labels) + 0.01 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert gradient.abs().max() < 1e-3
    assert (probe(x) == labels).float().mean() > 0.9


def by_hand(predicted: list[str], ranks: list[list[int]], styles: list[str]) -> PairScores:
    n = len(styles)
    concepts = [f"c{i}" for i in range(n)]
    return PairScores(concepts, styles, concepts, predicted, torch.tensor(ranks), torch.full((n,), 200))


def test_ignoring_the_style_is_the_mean_over_all_ways_to_deal_the_words_out() -> None:
    styles = [STYLES[0], STYLES[0], STYLES[1], STYLES[3]]
    scores = by_hand(
        [STYLES[0], STYLES[1], STYLES[1], STYLES[2]], [[1, 2, 1, 9], [1, 1, 1, 1], [6, 1, 2, 3], [1, 1, 1, 3]], styles
    )
    generator = np.random.default_rng(0)
    dealt = [by_hand(scores.predicted_styles, scores.ranks.tolist(), list(generator.permutation(styles))).columns()
             for _ in range(1000)]  # fmt: skip
    # four standard errors of a mean of 1,000 values in [0, 1]
    assert scores.ignoring_style() == pytest.approx(torch.stack(dealt).mean((0, 1)).tolist(), abs=4 * 0.5 / 1000**0.5)


# ------------------------------------------------------------------------------------------ real images


def test_real_images_score_far_above_chance_and_below_one(scorer: PairScorer) -> None:
    assert len(scorer.concepts) >= 190
    r1, r5, style, pair = (figure.value for figure in scorer.reference(HELDOUT).figures().values())
    # Measured: 0.74 first, 0.91 among five, style 0.84, both 0.59.
    assert 0.6 < r1 < 0.9
    assert 0.8 < r5 <= 1.0
    assert 0.7 < style < 0.97
    assert 0.45 < pair < 0.8


def test_real_images_under_other_names_score_at_chance(scorer: PairScorer) -> None:
    rows = [scorer.real.keys.index(key) for key in HELDOUT]
    features = Features(scorer.real.features.pooled[rows], scorer.real.features.texture[rows])
    concepts = [scorer.real.concepts[row] for row in rows]
    shifted = scorer.score(features, concepts[11:] + concepts[:11], [scorer.real.styles[row] for row in rows])
    assert shifted.figures()["concept R@1"].value < 0.06  # chance 0.005; some neighbours look alike
    assert shifted.figures()["pair accuracy"].value < 0.05


def test_the_probe_never_saw_what_it_is_asked(scorer: PairScorer) -> None:
    learned = {key for key, used in zip(scorer.real.keys, scorer.real.in_probe.tolist(), strict=True) if used}
    assert not learned & set(HELDOUT)
    assert not learned & set(training_choice("emoji200"))
    assert len(learned) == len(splits()["emoji200"]["train"]) - len(HELDOUT)


def test_as_many_training_pairs_as_held_out_ones_chosen_by_a_hash() -> None:
    chosen = [sample.key for sample in pairs_of("emoji200", "train")]
    assert len(chosen) == len(HELDOUT)
    assert set(chosen) <= set(splits()["emoji200"]["train"])
    assert [sample.key for sample in pairs_of("emoji200", "train", 5)] == chosen[:5]
    assert hash_order(sorted(chosen)) == chosen
    with pytest.raises(ValueError, match="at least one"):
        pairs_of("emoji200", "train", 0)


# ------------------------------------------------------------------------------------------ models


class Fake:
    """A model that looks its prompts up: in the asked style, or always in one; or draws grey."""

    def __init__(self, style: str | None = None, grey: bool = False) -> None:
        samples = [s for split in ("train", "heldout_pairs") for s in emoji_dataset("emoji200", split)]
        self.pictures = {(s.meta["concept"], s.meta["style"]): s for s in samples}
        self.asked = {captions(s)[0]: (s.meta["concept"], s.meta["style"]) for s in samples}
        self.style, self.grey = style, grey
        self.seeds: list[int] = []

    def sample(
        self,
        prompt: list[str],
        *,
        steps: int,
        guidance_scale: float | None,
        sampler: str,
        seed: list[int],
        batch_size: int,
    ) -> Samples:
        assert len(seed) == len(prompt) <= batch_size
        self.seeds += seed
        none, settings = (
            torch.zeros(len(prompt), dtype=torch.bool),
            {"steps": steps, "sampler": sampler, "model": "fake"},
        )
        if self.grey:
            images = torch.zeros(len(prompt), 3, 128, 128)
        else:
            pairs = [(concept, self.style or style) for concept, style in map(self.asked.__getitem__, prompt)]
            images = torch.stack([to_tensor(decode_image(self.pictures[pair].image)) for pair in pairs])
        return Samples(images, images, seed, prompt, none, none, settings)


def test_a_model_that_draws_the_real_images_scores_like_the_reference(judge: Judge) -> None:
    model = Fake()
    drawing = Drawing(seeds=2, batch_size=5)
    result = evaluate_pairs(model, limit=12, drawing=drawing, judge=judge)
    assert len(result.scores.concepts) == len(result.table) == len(result.images) == 24
    reference = result.reference.figures()
    for name in METRICS:
        assert result.figures[name].value == reference[name].value
    assert len(set(model.seeds)) == 24
    assert model.seeds[1] == model.seeds[0] + 1
    assert [row["seed"] for row in result.table] == model.seeds
    assert {row["style"] for row in result.table} <= set(STYLES)  # as it was asked for
    assert result.figures["diversity-EffNet"].value == pytest.approx(0, abs=1e-6)  # float32 features of one picture
    said = result.figures["FD-EffNet"].fingerprint
    assert {"n", "data", "reference", "resize", "image_format", "sampler", "steps", "seeds", "weights"} <= said.keys()
    assert said["weights"] == "fake"


def test_a_model_that_draws_one_grey_picture_scores_at_chance(judge: Judge) -> None:
    result = evaluate_pairs(Fake(grey=True), drawing=Drawing(seeds=1), judge=judge)
    assert result.figures["concept R@1"].value <= 2 / len(HELDOUT)  # one picture is nearest to one concept
    assert result.figures["pair accuracy"].value <= 2 / len(HELDOUT)
    # It does ignore the word.
    assert result.figures["style accuracy"].value == pytest.approx(result.scores.ignoring_style()[2])
    # Its prompt is one among 800, and one picture covers no neighbourhood of the real ones.
    assert result.figures["prompt R@1"].value <= 2 / len(HELDOUT)
    assert result.figures["recall-EffNet"].value == 0


def test_a_model_that_ignores_the_style_word_scores_what_the_row_for_it_says(judge: Judge) -> None:
    result = evaluate_pairs(Fake(style=STYLES[0]), split="train", drawing=Drawing(seeds=1), judge=judge)
    assert result.figures["concept R@1"].value > 0.6  # it draws the concept
    ignoring = dict(zip(METRICS, result.scores.ignoring_style(), strict=True))
    for name in ("style accuracy", "pair accuracy"):
        assert result.figures[name].value < 0.35
        # The row is what the same pictures score with the words dealt out at random; 69 pairs leave some scatter.
        assert result.figures[name].value == pytest.approx(ignoring[name], abs=0.1)


def test_text_alignment_tells_the_own_prompt_from_another(judge: Judge) -> None:
    real = judge.scorer.real
    rows = [real.keys.index(key) for key in HELDOUT]
    features, prompts = real.chosen(rows)
    own, other = judge.probe(features, prompts), judge.probe(features, prompts[1:] + prompts[:1])
    # Measured: cosine 0.62, first of 800 in 0.46, among five in 0.77.
    assert own.mean(0)[0] > 0.5
    assert own.mean(0)[1] > 0.3
    assert own.mean(0)[2] > 0.6
    assert other.mean(0)[0] < 0.2
    assert other.mean(0)[1] < 0.05


def test_a_scorer_of_another_data_set_and_bad_numbers_are_refused(scorer: PairScorer) -> None:
    with pytest.raises(ValueError, match="fitted on emoji200"):
        Judge("emoji", scorer)
    with pytest.raises(ValueError, match="at least 1"):
        Drawing(seeds=0)
