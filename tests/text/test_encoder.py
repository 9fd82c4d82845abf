from __future__ import annotations

import pytest
import torch

from ldm import load_text_encoder
from ldm.text import TextEncoder
from tests.conftest import tiny_text, word_tokenizer


@pytest.mark.parametrize("family", ["clip", "minilm"])
def test_context_is_77_tokens_wide_whatever_the_prompt(family: str) -> None:
    text = tiny_text(family)
    assert text(["", "a red square", "red " * 200]).shape == (3, 77, 16)


@pytest.mark.parametrize("family", ["clip", "minilm"])
def test_a_cut_prompt_is_reported_and_keeps_its_end_token(family: str) -> None:
    tokens = tiny_text(family).tokenize(["red " * 75, "red " * 76])
    assert tokens.truncated.tolist() == [False, True]
    assert tokens.ids[:, -1].tolist() == [2, 2]


def test_context_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    text = tiny_text("minilm")
    alone = text(["a red square"])[0]
    together = text(["red " * 50, "a red square", ""])[1]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)  # batched kernels may round differently


def test_minilm_context_is_zero_past_its_own_tokens_and_clips_is_not() -> None:
    assert not tiny_text("minilm")(["a red square"])[0, 5:].any()
    assert tiny_text("clip")(["a red square"])[0, 5:].any()


def test_tower_stays_frozen_and_in_evaluation_mode() -> None:
    text = tiny_text("clip")
    text.train()
    assert not any(module.training for module in text.modules())
    assert not any(parameter.requires_grad for parameter in text.parameters())


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="choose clip or minilm"):
        TextEncoder("t5", word_tokenizer())  # type: ignore[arg-type]


def test_bundled_minilm_knows_that_cats_are_nearer_to_kittens_than_to_buses() -> None:
    text = load_text_encoder("emoji")
    tokens = text.tokenize(["a cat", "a kitten", "a bus"])
    pooled = text.encode(tokens).sum(1) / tokens.lengths[:, None]
    near = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert near[0] > near[1] + 0.2  # measured: 0.77 and 0.22
