"""Prompt → tokens → context; the null prompt."""

from ldm.text.clip import clip_tokenizer, clip_vocabulary
from ldm.text.encoder import TextEncoder, Tokens

__all__ = ["TextEncoder", "Tokens", "clip_tokenizer", "clip_vocabulary"]
