"""The frozen text tower: prompts → context (n, 77, d), by CLIP (Radford et al., 2103.00020) or MiniLM (2002.10957).

Shapes: n prompts, m = 77 tokens, d the tower's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

MAX_TOKENS = 77
# MiniLM runs at the first of these lengths that a prompt fits: the choice hangs on that prompt alone, so
# that its context does not depend on its neighbours in the batch.
_LENGTHS = (16, 32, MAX_TOKENS)


@dataclass(frozen=True)
class Tokens:
    """Tokenised prompts."""

    ids: Tensor  # begin and end tokens included, padded, int64 (n, 77)
    lengths: Tensor  # tokens before the padding, int64 (n,)
    truncated: Tensor  # whether a prompt was cut to 77 tokens, bool (n,)


class TextEncoder(nn.Module):
    """Text tower with its tokenizer.

    CLIP reads all 77 tokens, the padding being part of the text that it was trained with; its context is the last
    hidden state after the final norm, as SD 1.x takes it. SD 2.x takes OpenCLIP's last layer but one, then the final
    norm: the same class with one layer less. MiniLM reads a prompt's own tokens, and its context is
    padded with zeros.

    Raises:
        ValueError: for an unknown family or activation.
    """

    def __init__(
        self,
        family: Literal["clip", "minilm"],
        tokenizer: str,  # a tokenizers' JSON, as text
        width: int = 768,  # d
        num_layers: int = 12,
        num_heads: int = 12,
        vocab_size: int = 49408,
        pad_token: int = 49407,  # id of the padding; 0 in SD 2.x
        activation: Literal["quick_gelu", "gelu"] = "quick_gelu",  # of CLIP's layers: OpenAI's, or OpenCLIP's
    ) -> None:
        super().__init__()
        if family not in ("clip", "minilm"):
            raise ValueError(f"text tower family={family!r} is unknown; choose clip or minilm")
        if activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"text tower activation={activation!r} is unknown; choose quick_gelu or gelu")
        # Plain, for the manifest of a checkpoint; the tokenizer has its own file.
        sizes = {"width": width, "num_layers": num_layers, "num_heads": num_heads, "vocab_size": vocab_size}
        self.arguments: dict[str, Any] = {"family": family, **sizes, "pad_token": pad_token, "activation": activation}
        self.family, self.width, self.pad_token, self.tokenizer_json = family, width, pad_token, tokenizer
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        shape: dict[str, Any] = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "vocab_size": vocab_size,
        }
        self.tower: nn.Module
        if family == "clip":
            tower = CLIPTextModel(CLIPTextConfig(**shape, max_position_embeddings=MAX_TOKENS, hidden_act=activation))
            # Older releases of transformers hold the same tower one name deeper; on disk it has one set of names.
            self.tower = getattr(tower, "text_model", tower)
        else:
            self.tower = BertModel(BertConfig(**shape), add_pooling_layer=False)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: the tower is frozen, whatever a trainer asks of its parent."""
        return super().train(False)

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Token ids, cut to 77 with the end token kept, and a flag for each prompt that was cut."""
        encoded = [e.ids for e in self.tokenizer.encode_batch(list(prompts))]
        cut = [ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], ids[-1]] for ids in encoded]
        padded = [ids + [self.pad_token] * (MAX_TOKENS - len(ids)) for ids in cut]
        return Tokens(
            torch.tensor(padded, dtype=torch.int64).reshape(-1, MAX_TOKENS),
            torch.tensor([len(ids) for ids in cut], dtype=torch.int64),
            torch.tensor([len(ids) > MAX_TOKENS for ids in encoded], dtype=torch.bool),
        )

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Context of prompts, shape (n, 77, d), in the type and on the device of the weights."""
        return self.encode(self.tokenize(prompts))

    @torch.no_grad()
    def encode(self, tokens: Tokens) -> Tensor:
        """Context of tokens, shape (n, 77, d)."""
        weight = next(self.tower.parameters())
        ids = tokens.ids.to(weight.device)
        if self.family == "clip":
            return self.tower(input_ids=ids).last_hidden_state
        context = torch.zeros(len(ids), MAX_TOKENS, self.width, dtype=weight.dtype, device=weight.device)
        shortest = 0
        for length in _LENGTHS:
            rows = ((tokens.lengths > shortest) & (tokens.lengths <= length)).nonzero()[:, 0].to(weight.device)
            shortest = length
            if len(rows):
                own = torch.arange(length, device=weight.device) < tokens.lengths.to(weight.device)[rows, None]
                state = self.tower(input_ids=ids[rows, :length], attention_mask=own.long()).last_hidden_state
                context[rows, :length] = state * own[..., None]
        return context
