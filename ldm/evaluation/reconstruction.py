"""What an autoencoder keeps of an image, and what its latents are like (DESIGN §4, the autoencoder).

Stands at ``image ─ autoencoder.encode ─► z ─ autoencoder.decode ─► image``, beside the training of stage one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ldm.autoencoder import Autoencoder
from ldm.data import ShardDataset, decode_image, emoji_dataset, to_tensor

ACTIVE = 0.01  # a unit is active if the variance of its posterior mean over the data exceeds this


@torch.inference_mode()
def evaluate_autoencoder(
    autoencoder: Autoencoder,
    name: str = "emoji",
    splits: Sequence[str] = ("heldout_pairs", "heldout_concepts"),
    batch_size: int = 16,
    limit: int | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, dict[str, Any]]:
    """Reconstruct the images of each split from the mode of the posterior, and from one sample of it.

    Args:
        autoencoder: in evaluation mode, on ``device``.
        name: a data set of ldm.data.emoji_dataset.
        splits: its splits.
        batch_size: images at a time.
        limit: so many images a split, the first by key; None is all.
        device: where the autoencoder is.

    Returns:
        By split: ``num_images``; ``psnr`` in dB and ``ssim`` from the mode, ``psnr_sample`` from a sample, each the
        mean over images; ``latent_mean`` and ``latent_std`` a channel of the scaled z; ``kl_per_unit`` in nats;
        ``active_units``, the share whose posterior mean varies over the data by more than 0.01
        (Burda et al., 1509.00519, §5.3).

    Raises:
        ValueError: an unknown name or split, a limit or batch size below 1, NaN or infinity in latents or images.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size={batch_size}, limit={limit}: each must be at least 1 (a limit may be None)")
    return {
        split: _evaluate(autoencoder, emoji_dataset(name, split), split, batch_size, limit, device) for split in splits
    }


def _evaluate(
    autoencoder: Autoencoder,
    samples: ShardDataset,
    split: str,
    batch_size: int,
    limit: int | None,
    device: str | torch.device,
) -> dict[str, Any]:
    count = min(len(samples), limit or len(samples))
    generator = torch.Generator(device).manual_seed(0)
    columns: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "psnr_sample": [], "kl": []}  # each (n,) a batch
    latents, means = [], []
    for first in range(0, count, batch_size):
        batch = [samples[i] for i in range(first, min(first + batch_size, count))]
        x = torch.stack([to_tensor(decode_image(s.image, s.key)) for s in batch]).to(device)
        posterior, z = autoencoder.posterior(x), autoencoder.encode(x)
        decoded = autoencoder.decode(z)
        columns["psnr"].append(psnr(decoded, x))
        columns["ssim"].append(ssim(decoded, x))
        columns["psnr_sample"].append(psnr(autoencoder.decode(autoencoder.encode(x, generator)), x))
        columns["kl"].append(posterior.kl() / posterior.mean[0].numel())
        latents.append(z.double().cpu())
        means.append(posterior.mean.double().cpu())
    value = {key: torch.cat(parts).double().mean().item() for key, parts in columns.items()}
    z, mean = torch.cat(latents), torch.cat(means)  # (n, c, h/8, w/8)
    latent_std = z.std((0, 2, 3))
    active = (mean.var(0, correction=0) > ACTIVE).double().mean().item()
    measured = torch.tensor([value["ssim"], value["kl"], *latent_std.tolist()])
    if not (torch.isfinite(measured).all() and torch.isfinite(mean).all()):
        raise ValueError(f"{split}: latents or images are NaN or infinite; check the autoencoder's weights")
    return {
        "num_images": count,
        "psnr": value["psnr"],
        "ssim": value["ssim"],
        "psnr_sample": value["psnr_sample"],
        "latent_mean": z.mean((0, 2, 3)).tolist(),
        "latent_std": latent_std.tolist(),
        "kl_per_unit": value["kl"],
        "active_units": active,
    }


def psnr(decoded: Tensor, x: Tensor) -> Tensor:
    """10 log10(2² / mean squared error) of each image, in dB; infinite for an exact copy.

    Args:
        decoded: shape (n, 3, h, w), clamped to [-1, 1] here.
        x: in [-1, 1], the same shape.

    Returns:
        float32 (n,); the mean over images is the mean of these, not the PSNR of the mean error.
    """
    # Of torch's two ways to take a mean, the one over images would hide an image that is wrong altogether.
    return peak_signal_noise_ratio(decoded.float().clamp(-1.0, 1.0), x, data_range=2.0, reduction="none", dim=(1, 2, 3))


def ssim(decoded: Tensor, x: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al., 2004), float32 (n,); arguments as in :func:`psnr`.

    Taken over [0, 1]: SSIM compares means by their ratio, and around grey those of [-1, 1] are zero.
    """
    ours, real = ((images.float().clamp(-1.0, 1.0) + 1.0) / 2.0 for images in (decoded, x))
    value = structural_similarity_index_measure(ours, real, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value
