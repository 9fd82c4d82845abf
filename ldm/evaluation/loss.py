"""The loss of a trained model on fixed (x, t, ε): by timestep, by what captions say, by image; and of two models.

Stands at ``loss(prediction, target)`` of the picture, without the training: no caption is dropped, z is the mode of the
posterior, and t and ε hang on the image's key alone, so that two models see the same.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from ldm import randomness
from ldm.data import Sample, captions
from ldm.diffusion import per_sample_error, target, to_eps
from ldm.diffusion.schedule import per_image
from ldm.evaluation.features import image_batches
from ldm.evaluation.figures import Figure, mean, paired
from ldm.pipeline import LatentDiffusion

BINS = 10  # equal ranges of timesteps, each image once in each
LEAST_A_GROUP = 3  # images that a group needs to be listed


class Losses(NamedTuple):
    """Squared error of n images, each once in each range of timesteps."""

    error: np.ndarray  # (n, BINS)
    times: list[str]  # the ranges
    samples: Sequence[Sample]

    @property
    def groups(self) -> list[str]:
        """What is not independent: the concept where the data name one, else the key."""
        return [s.meta.get("concept", s.key) for s in self.samples]

    def by_timestep(self) -> list[Figure]:
        """The mean error in each range of timesteps."""
        return [mean(name, c, self.groups) for name, c in zip(self.times, self.error.T, strict=True)]

    def by_caption(self) -> list[Figure]:
        """The mean error of the images of each style, and of those whose caption has a word; largest first."""
        members: dict[str, set[int]] = defaultdict(set)
        for i, sample in enumerate(self.samples):
            style = sample.meta.get("style")
            words = re.findall(r"\w{3,}", captions(sample)[0].lower().replace(f"{style} style".lower(), ""))
            for name in [*words, *([f"style: {style}"] if style else [])]:
                members[name].add(i)
        of_image, groups = self.error.mean(1), np.array(self.groups)
        chosen = {name: sorted(rows) for name, rows in members.items() if LEAST_A_GROUP <= len(rows) < len(groups)}
        return sorted((mean(k, of_image[rows], groups[rows]) for k, rows in chosen.items()), key=lambda f: -f.value)

    def worst(self, count: int = 10) -> list[tuple[str, str, float]]:
        """Key, caption and mean error of the images with the largest."""
        of_image = self.error.mean(1)
        return [(self.samples[i].key, captions(self.samples[i])[0], float(of_image[i]))
                for i in np.argsort(-of_image)[:count]]  # fmt: skip

    def less(self, other: "Losses") -> list[Figure]:
        """This loss less another on the same (x, t, ε): over all timesteps, and in each range of them."""
        columns = zip(self.times, self.error.T, other.error.T, strict=True)
        whole = paired("all", self.error.mean(1), other.error.mean(1), self.groups)
        return [whole, *(paired(name, a, b, self.groups) for name, a, b in columns)]


@torch.inference_mode()
def measure(
    model: LatentDiffusion,
    samples: Sequence[Sample],  # whose first captions are taken
    batch_size: int = 16,  # changes speed alone
    seed: int = 0,  # of t and ε
    of_noise: bool = False,  # the error of σ ε in z_t = α z + σ ε, whatever the UNet predicts; it is that of α z, too
) -> Losses:
    """The error of what the UNet predicts of each image, mean over a latent's values."""
    steps, size = model.schedule.num_steps, (model.defaults.height, model.defaults.width)
    bounds = [k * steps // BINS for k in range(BINS + 1)]
    errors = []
    for part, images in image_batches(samples, batch_size, *size):
        z = model.autoencoder.encode(images.to(model.device, model.dtype)).float()
        context = model.context([captions(s)[0] for s in part])[0].to(model.device, model.dtype)
        places = [int(hashlib.sha256(s.key.encode()).hexdigest()[:15], 16) for s in part]
        columns = []
        for low, high in pairwise(bounds):
            t = torch.tensor([low + randomness.integer(seed, f"loss {low}", place, high - low) for place in places])
            eps = torch.stack([randomness.normal(seed, f"loss noise {low}", p, z.shape[1:]) for p in places]).to(z)
            alpha, sigma = (per_image(f(t), z) for f in (model.schedule.alpha, model.schedule.sigma))
            noisy = model.schedule.add_noise(z, eps, t).to(model.dtype)
            prediction = model.unet(noisy, t.to(model.device), context).float()
            wanted = target(model.prediction, z, eps, alpha, sigma)
            if of_noise:
                prediction = sigma * to_eps(model.prediction, prediction, noisy.float(), alpha, sigma)
                wanted = sigma * eps
            columns.append(per_sample_error(prediction, wanted).double().cpu())
        errors.append(torch.stack(columns, 1))
    error = torch.cat(errors).numpy()
    if not np.isfinite(error).all():
        raise ValueError("the loss is NaN or infinite; check the weights of the UNet")
    return Losses(error, [f"{low} to {high - 1}" for low, high in pairwise(bounds)], samples)


def check_comparable(a: LatentDiffusion, b: LatentDiffusion) -> None:
    """Raise ValueError unless both models' errors are of the same thing."""
    own, other = a.autoencoder.state_dict(), b.autoencoder.state_dict()
    same = {
        "autoencoder": own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own),
        "schedule": torch.equal(a.schedule.alpha_bar, b.schedule.alpha_bar),
        "prediction": a.prediction == b.prediction,
        "size": (a.defaults.height, a.defaults.width) == (b.defaults.height, b.defaults.width),
    }
    if differ := [name for name, agrees in same.items() if not agrees]:
        raise ValueError(
            f"the two models differ in {', '.join(differ)}, so their losses measure different things; "
            "compare what they draw: ldm evaluate model=B against=RESULT_FOLDER_OF_A"
        )
