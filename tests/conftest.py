"""Small models and shards that the tests share: every class is the real one, only smaller."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ldm import checkpoint
from ldm.autoencoder import Autoencoder
from ldm.data import write_shard
from ldm.diffusion import Schedule
from ldm.pipeline import Defaults, LatentDiffusion
from ldm.text import TextEncoder
from ldm.unet import UNet

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "red", "green", "blue", "square", "disc", ",", "style"]


def word_tokenizer() -> str:
    """A tokenizer of twelve words with begin and end tokens, as JSON."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return tokenizer.to_str()


def tiny_text(family: str = "minilm") -> TextEncoder:
    """A random text tower, 16 wide."""
    torch.manual_seed(1)
    return TextEncoder(family, word_tokenizer(), 16, 2, 2, len(WORDS), 0)  # type: ignore[arg-type]


def tiny_model(family: str = "minilm", prediction: str = "epsilon") -> LatentDiffusion:
    """A random model for 32×32 pixels whose UNet is not zero at its end."""
    text = tiny_text(family)
    torch.manual_seed(2)
    unet = UNet(widths=(32, 64), attention=(False, True), num_blocks=1, num_heads=2, context_dim=16)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    autoencoder = Autoencoder(widths=(32, 64), num_blocks=1, stem=4).eval()
    autoencoder.set_latent_scale(torch.tensor([0.1, -0.2, 0.0, 0.3]), torch.tensor([1.0, 2.0, 0.5, 1.5]))
    model = LatentDiffusion(
        unet.eval(),
        autoencoder,
        text,
        Schedule(),
        prediction,
        Defaults("trailing", 3.0, 32, 32),  # type: ignore[arg-type]
    )
    return model.to("cpu")


@pytest.fixture
def model() -> LatentDiffusion:
    return tiny_model()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of 24 pictures, squares and discs in three colours, with two captions each, 32×32."""
    folder = tmp_path_factory.mktemp("shapes")
    samples = []
    for i in range(24):
        colour, shape = ["red", "green", "blue"][i % 3], ["square", "disc"][i % 2]
        y, x = np.mgrid[0:32, 0:32] - 12 - i % 8
        inside = (np.abs(y) < 9) & (np.abs(x) < 9) if shape == "square" else y**2 + x**2 < 80
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[inside] = [(220, 30, 30), (30, 180, 60), (40, 60, 220)][i % 3]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        captions = [f"a {colour} {shape}", f"{shape}, {colour} style"]
        members = {
            "png": buffer.getvalue(),
            "txt": captions[0].encode(),
            "json": json.dumps({"captions": captions}).encode(),
        }
        samples.append((f"{i:04d}", members))
    write_shard(folder / "shapes.tar", samples)
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text tower and an autoencoder, tiny and random, for stage two."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    autoencoder = Autoencoder(widths=(32, 64), num_blocks=1, stem=4)
    checkpoint.save(folder / "text", checkpoint.Contents({"text_encoder": tiny_text("clip")}))
    checkpoint.save(folder / "autoencoder", checkpoint.Contents({"autoencoder": autoencoder}))
    return folder / "text", folder / "autoencoder"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """How many threads share a sum decides its last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
