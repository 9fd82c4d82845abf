"""Text alignment: does a picture say what its prompt said, where no network of images and text is at hand?

A linear map from image features to the bundled text tower's embedding, fitted on real training images, stands in for
CLIP's; its figures are therefore not called CLIPScore. Shapes: n images, m candidates, d widths.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.evaluation.features import Features
from ldm.text import TextEncoder

COLUMNS = ("text alignment", "prompt R@1", "prompt R@5")


class TextProbe:
    """Ridge regression (Hoerl & Kennard, 1970) in its dual form, since features are more than images."""

    def __init__(
        self,
        features: Features,  # of real images
        captions: Sequence[str],  # one each, among the candidates
        text_encoder: TextEncoder,
        candidates: Sequence[str],  # the prompts among which a picture's own is looked for
        # Of the squared weights, times the number of features. Held-out pairs of emoji200, cosine and R@1 of real
        # images: 0.57 and 0.46 at 0.01, 0.62 and 0.46 at 0.3, 0.58 and 0.35 at 3.
        penalty: float = 0.3,
    ) -> None:
        self.candidates = sorted(set(candidates))
        number = {text: i for i, text in enumerate(self.candidates)}
        contexts = [text_encoder(self.candidates[i : i + 64]).float() for i in range(0, len(self.candidates), 64)]
        embedded = F.normalize(torch.cat([context.mean(1) for context in contexts]), dim=1)  # (m, d)
        x, y = torch.cat(features, 1), embedded[[number[caption] for caption in captions]]
        self._mean, self._std, centre = x.mean(0), x.std(0) + 1e-6, y.mean(0)
        x = (x - self._mean) / self._std
        self._weight = x.T @ torch.linalg.solve(x @ x.T + penalty * x.shape[1] * torch.eye(len(x)), y - centre)
        self._embedded = F.normalize(embedded - centre, dim=1)

    def __call__(self, features: Features, prompts: Sequence[str]) -> Tensor:
        """COLUMNS of each picture, (n, 3): cosine with its prompt (about the mean caption); found first; among five."""
        seen = F.normalize(((torch.cat(features, 1) - self._mean) / self._std) @ self._weight, dim=1)
        cosine = seen @ self._embedded.T  # (n, m)
        own = cosine.gather(1, torch.tensor([[self.candidates.index(prompt)] for prompt in prompts]))
        rank = (cosine >= own).sum(1)
        return torch.stack([own[:, 0], rank <= 1, rank <= 5], 1)
