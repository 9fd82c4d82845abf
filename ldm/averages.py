"""Averages of any length after training, from a few snapshots (EDM2: Karras et al., 2312.02696, §3 and appendix C).

A power-function average up to step t is θ̂(t) = ∫ p(s) θ(s) ds, its profile p(s) = (γ + 1) s^γ / t^(γ+1) on [0, t], its
length σ_rel the profile's standard deviation over t. A training writes some down now and then; any other profile is
nearly a weighted sum of those, and so is its average.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

FOLDER = "averages"  # of a run
WORST = 0.1  # relative error of a profile beyond which it is another average than the one asked for


class Profile(NamedTuple):
    """Which average: of what length, up to which step."""

    sigma: float  # σ_rel
    step: int  # optimiser steps


def exponent(sigma: float) -> float:
    """γ of σ_rel = √(γ + 1) / ((γ + 2) √(γ + 3)) (2312.02696, §3.1); ValueError unless 0 < σ_rel < 0.288."""
    if not 0.0 < sigma < 12.0**-0.5:
        raise ValueError(f"sigma_rel={sigma}: the rule is 0 < sigma_rel < 0.288; 0.05 to 0.15 are usual")
    roots = np.roots([1.0, 7.0, 16.0 - sigma**-2, 12.0 - sigma**-2])
    return float(roots[np.isreal(roots)].real.max())


def decay(sigma: float, step: int) -> float:
    """β of θ̂ ← β θ̂ + (1 - β) θ at optimiser step ``step``, 1 the first: (1 - 1/t)^(γ+1) (§3.1)."""
    return (1.0 - 1.0 / step) ** (exponent(sigma) + 1.0)


def overlap(a: Profile, b: Profile) -> float:
    """∫ p_a p_b ds = (γ_a + 1)(γ_b + 1)/(γ_a + γ_b + 1) · t^(γ_a+γ_b+1) / (t_a^(γ_a+1) t_b^(γ_b+1)), t the smaller."""
    (first, g_first), (last, g_last) = sorted((p.step, exponent(p.sigma)) for p in (a, b))
    return (g_first + 1) * (g_last + 1) / (g_first + g_last + 1) * (first / last) ** g_last / last


def weights_of(kept: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """How much of each kept average makes the wanted one, by least squares over the profiles (§3.2): (n,).

    They sum to 1, as profiles do, so that weights that stand still stay what they are. ValueError if no sum comes near.
    """
    gram = np.array([[overlap(a, b) for b in kept] for a in kept])
    cross, own = np.array([overlap(a, wanted) for a in kept]), overlap(wanted, wanted)
    scale = np.sqrt(np.diag(gram))  # profiles of unit norm, so that rounding is cut evenly
    found: np.ndarray = np.linalg.lstsq(gram / np.outer(scale, scale), cross / scale, rcond=1e-12)[0] / scale
    found /= found.sum()
    error = max(1.0 + (found @ gram @ found - 2.0 * found @ cross) / own, 0.0) ** 0.5
    if not error < WORST:
        raise ValueError(
            f"sigma_rel={wanted.sigma} at step {wanted.step} is {error:.0%} off with {len(kept)} snapshots of "
            f"{sorted({p.sigma for p in kept})}; take a length between them, or a smaller checkpoint.every"
        )
    return found


def write(folder: Path, profile: Profile, weights: dict[str, Tensor]) -> None:
    """Keep an average in half precision: FOLDER/step-00001000-0.050.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{profile.step:08d}-{profile.sigma:.3f}.safetensors"
    half = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in weights.items()}
    safetensors.torch.save_file(half, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


def reconstruct(folder: Path, sigma: float, step: int) -> dict[str, Tensor]:
    """The average of a length σ_rel up to the step of a snapshot, float32; ValueError if there is none or it is far."""
    named = {path: path.stem.split("-") for path in sorted(folder.glob("step-*-*.safetensors"))}
    files = {Profile(float(s), int(t)): path for path, (_, t, s) in named.items() if int(t) <= step}
    if step not in {profile.step for profile in files}:
        raise ValueError(f"{folder} holds no averages of step {step}; train with ema.power=[0.05,0.10]")
    total: dict[str, Tensor] = {}
    for weight, path in zip(weights_of(list(files), Profile(sigma, step)).tolist(), files.values(), strict=True):
        for name, value in safetensors.torch.load_file(path).items():
            total[name] = total.get(name, 0.0) + weight * value.double()
    return {name: value.float() for name, value in total.items()}
