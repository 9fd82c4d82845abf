"""The autoencoder's fidelity: what it gives back of an image, and what its latents are like (DESIGN §4).

Stands at ``image ─ autoencoder.encode ─► z ─ autoencoder.decode ─► image``, beside the training of stage one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ldm.autoencoder import Autoencoder
from ldm.data import Sample
from ldm.evaluation.features import EfficientNetLite0, image_batches
from ldm.evaluation.figures import Figure
from ldm.evaluation.metrics import NEIGHBOURS, ImageMetric, figures, means, set_distances

ACTIVE = 0.01  # a unit is active if the variance of its posterior mean over the data exceeds this
COLUMNS = ("PSNR, mode (dB)", "PSNR, sample (dB)", "SSIM", "KL a unit (nats)")


@torch.inference_mode()
def evaluate_autoencoder(
    autoencoder: Autoencoder,  # in evaluation mode
    samples: Sequence[Sample],
    batch_size: int = 16,
    network: EfficientNetLite0 | None = None,  # for set distances to the originals, rFD-EffNet and its kin; None: none
) -> tuple[dict[str, Figure], Tensor, float, Tensor]:
    """Reconstruct images from the mode of the posterior, and from one sample of it.

    Returns:
        COLUMNS, each the mean over images, and set distances; the standard deviation of the scaled z, a channel;
        the share of active units, whose posterior mean varies over the data (Burda et al., 1509.00519, §5.3); and
        COLUMNS of each image, (n, 4).

    Raises:
        ValueError: NaN or infinity in latents or images.
    """
    device = next(autoencoder.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    metrics = [ImageMetric(lambda columns: columns, means(COLUMNS), over_ranks=False)]
    if network is not None and len(samples) > NEIGHBOURS:
        metrics.append(ImageMetric(lambda images: network(images).pooled, set_distances, over_ranks=False))
    latents, centres, rows = [], [], []
    for part, images in image_batches(samples, batch_size):
        x, keys = images.to(device), [s.key for s in part]
        posterior, z = autoencoder.posterior(x), autoencoder.encode(x)
        decoded, sampled = autoencoder.decode(z), autoencoder.decode(autoencoder.encode(x, generator))
        columns = (psnr(decoded, x), psnr(sampled, x), ssim(decoded, x), posterior.kl() / posterior.mean[0].numel())
        rows.append(torch.stack(columns, 1).cpu())
        metrics[0].update(rows[-1], groups=keys)
        for metric in metrics[1:]:
            metric.update(images, groups=None)
            metric.update(decoded.float(), groups=keys)
        latents.append(z.double().cpu())
        centres.append(posterior.mean.double().cpu())
    z, centre = torch.cat(latents), torch.cat(centres)  # (n, c, h/8, w/8)
    found = figures(metrics[0])
    if not (torch.isfinite(z).all() and torch.isfinite(centre).all() and math.isfinite(found["SSIM"].value)):
        raise ValueError("latents or images are NaN or infinite; check the autoencoder's weights")
    for metric in metrics[1:]:
        found |= {f"r{name}": figure._replace(name=f"r{name}") for name, figure in figures(metric).items()}
    active = (centre.var(0, correction=0) > ACTIVE).double().mean().item()
    return found, z.std((0, 2, 3)), active, torch.cat(rows)


def psnr(decoded: Tensor, x: Tensor) -> Tensor:
    """10 log10(2² / mean squared error) of each image, in dB, float32 (n,); infinite for an exact copy.

    ``decoded`` is clamped to [-1, 1], where x is; both (n, 3, h, w). The mean over images is the mean of these.
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
