"""Prompt → tokens → context; the null prompt."""

from ldm.text.encoder import TextEncoder, Tokens

__all__ = ["TextEncoder", "Tokens"]
