"""Metrics: closed forms of Gaussians, torchmetrics' own values, two processes, and what too few images get."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from ldm.evaluation import (
    Figure,
    ImageMetric,
    compare,
    diversity,
    figures,
    mean,
    means,
    paired,
    published,
    set_distances,
)
from ldm.evaluation.metrics import PUBLISHED, frechet_distance, inside, kernel_distance
from ldm.randomness import normal

ONCE = torch.ones(1, 1, dtype=torch.float64)


def draw(stream: str, n: int, d: int, trial: int = 0) -> Tensor:
    return normal(0, stream, trial, (n, d)).double()


# ------------------------------------------------------------------------------------------ closed forms


def test_the_frechet_distance_of_gaussians_is_its_closed_form() -> None:
    shift, scale = torch.linspace(0, 1, 6), torch.linspace(0.5, 2, 6)
    x, y = draw("x", 40_000, 6), draw("y", 40_000, 6) * scale + shift
    exact = (shift.square().sum() + (1 - scale).square().sum()).item()  # both covariances are diagonal
    found = frechet_distance(x, y, ONCE.expand(1, len(y))).item()
    assert found == pytest.approx(exact, rel=0.02)  # five standard errors of 0.4 % each (over 20 other draws)


@pytest.mark.parametrize("n", [30, 300], ids=["fewer images than features", "more"])
def test_the_frechet_distance_is_that_of_the_covariances_themselves(n: int) -> None:
    x, y = draw("x", n, 50), draw("y", n + 10, 50) * 1.3 + 0.2

    def root(a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    s, t = x.T.cov(), y.T.cov()
    middle = root(root(s) @ t @ root(s)).trace()
    expected = (x.mean(0) - y.mean(0)).square().sum() + s.trace() + t.trace() - 2 * middle
    found = frechet_distance(x, y, ONCE.expand(1, len(y)))[0]
    # The matrix root of a singular product is good to the square root of float64's precision.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert frechet_distance(x, x, ONCE.expand(1, len(x)))[0].abs() < 1e-9


def test_weights_count_images_as_often_as_they_are_repeated() -> None:
    x, y = draw("x", 20, 5), draw("y", 4, 5)
    weights = torch.tensor([[2.0, 0.0, 1.0, 3.0]]).double()
    repeated = y[[0, 0, 2, 3, 3, 3]]
    torch.testing.assert_close(frechet_distance(x, y, weights)[0], frechet_distance(x, repeated, ONCE.expand(1, 6))[0])


def expected_kernel(a: Tensor, b: Tensor) -> float:
    """E (xᵀy / d + 1)³ for x of N(a, 1) and y of N(b, 1), independent, by the moments of xᵀy."""
    d, ab, aa, bb = len(a), (a @ b).item(), (a @ a).item(), (b @ b).item()
    second = ab**2 + aa + bb + d
    third = ab**3 + 3 * ab * bb + 3 * ab * (aa + d + 2)
    return third / d**3 + 3 * second / d**2 + 3 * ab / d + 1


def test_kid_of_gaussians_is_its_closed_form_without_bias_at_ten_images() -> None:
    zero, shift = torch.zeros(4).double(), torch.tensor([1.0, 0.5, 0.0, 0.0]).double()
    exact = expected_kernel(zero, zero) + expected_kernel(shift, shift) - 2 * expected_kernel(zero, shift)
    found = torch.stack([
        kernel_distance(draw("x", 10, 4, i), draw("y", 10, 4, i) + shift, ONCE.expand(1, 10))[0] for i in range(2000)
    ])  # fmt: skip
    assert found.mean().item() == pytest.approx(exact, abs=4 * found.std().item() / 2000**0.5)  # four standard errors


def test_precision_and_recall_of_sets_that_overlap_by_half() -> None:
    line = torch.arange(20).double()[:, None]
    moved = line + 10.0
    assert inside(line, moved).mean() == pytest.approx(0.65)  # 10 to 19, and 3 more within reach of the third neighbour
    assert inside(moved, line).mean() == pytest.approx(0.65)
    assert inside(line, line + 100).mean() == 0


def test_diversity_of_known_angles() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [-1.0, 0.0], [5.0, 5.0]]).double()
    (found,) = diversity(rows, np.array([0, 0, 1, 1, 2]))  # a right angle, a straight one, and a prompt of one image
    assert found.value == pytest.approx((1 + 2) / 2)
    assert found.n == 4
    assert diversity(rows, np.arange(5)) == []


# ------------------------------------------------------------------------------------------ torchmetrics' values


class Flat(nn.Module):
    """Features of an image: its own values."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def test_torchmetrics_own_fid_and_kid_give_the_same_over_the_same_features() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = (normal(1, stream, 0, (n, 3, 2, 2)).double() for stream, n in (("x", 80), ("y", 80)))
    fake = fake * 1.2 + 0.1
    fid = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=80)
    ours = ImageMetric(Flat(), set_distances)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    ours.update(real, groups=None)
    ours.update(fake, groups=[str(i) for i in range(80)])
    found = ours.compute()
    assert found["FD-EffNet"].item() == pytest.approx(fid.compute().item(), rel=1e-6)
    assert found["KID-EffNet"].item() == pytest.approx(kid.compute()[0].item(), rel=1e-6)


class Broken:
    def __init__(self, **arguments: object) -> None:
        raise OSError("no weights in reach.\nTry again.")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_metric_is_torchmetrics_own_or_one_clear_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kind, _ = PUBLISHED[name]
    there = importlib.import_module(f"torchmetrics.{module}")
    monkeypatch.setattr(there, kind, lambda **arguments: ("made", arguments))
    assert published(name)[0] == "made"
    monkeypatch.setattr(there, kind, Broken)
    with pytest.raises(ValueError, match=rf"{name} cannot be had here \(no weights in reach\); FD-EffNet"):
        published(name)


def test_an_unknown_published_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of FID, IS, CLIPScore"):
        published("fdd")


# ------------------------------------------------------------------------------------------ intervals


def covered(trials: int, truth: float, once: Callable[[int], Figure]) -> int:
    return sum(found.low <= truth <= found.high for found in map(once, range(trials)))


def test_the_interval_of_a_mean_covers_the_truth_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(0)
    groups = [str(i // 3) for i in range(120)]

    def once(trial: int) -> Figure:
        # Three pictures a concept that succeed or fail together, with a chance of one half.
        return mean("x", np.repeat(generator.random(40) < 0.5, 3).astype(float), groups, 300, trial)

    # 190 expected, three standard deviations of 3.1, and one for the percentile method
    assert 180 <= covered(200, 0.5, once) <= 198


def test_the_intervals_of_frechet_distance_and_kid_cover_what_other_images_give() -> None:
    real = draw("real", 200, 5)
    groups = np.array([-1] * 200 + list(range(60)))

    def once(trial: int) -> list[Figure]:
        return set_distances(torch.cat([real, draw("fake", 60, 5, trial) * 1.2 + 0.3]), groups)

    found = [once(trial) for trial in range(100)]
    for k, name in enumerate(("FD-EffNet", "KID-EffNet")):
        figures = [one[k] for one in found]
        assert figures[0].name == name
        expected = np.mean([f.value for f in figures])  # at this n: a Fréchet distance of 60 images is biased
        inside = sum(f.low <= expected <= f.high for f in figures)
        # 95 expected, three standard deviations of 2.2, and two for 100 resamplings of 60 images
        assert 86 <= inside <= 99, name


def test_the_interval_widens_where_pictures_of_a_concept_agree() -> None:
    values = np.repeat([0.0, 1.0] * 20, 5)
    grouped = mean("x", values, [str(i // 5) for i in range(200)])
    single = mean("x", values, [str(i) for i in range(200)])
    assert grouped.high - grouped.low > 1.8 * (single.high - single.low)  # √5 = 2.2
    assert mean("x", values, [str(i) for i in range(200)]) == single


def test_pairing_resolves_what_two_unpaired_means_do_not() -> None:
    images, noise = draw("hard", 100, 1)[:, 0].numpy(), draw("noise", 100, 1)[:, 0].numpy()
    a, b = images + 0.1 + 0.05 * noise, images
    found = paired("loss", a, b, range(100))
    assert found.resolved
    assert found.verdict == "resolved"
    assert found.gain == pytest.approx(2**0.5 / 0.05, rel=0.3)  # two spreads of 1 against one of 0.05
    assert not compare(mean("loss", a, range(100)), mean("loss", b, range(100))).resolved


def test_equal_values_are_not_resolved_and_other_fingerprints_are_not_compared() -> None:
    same = np.arange(10.0)
    assert paired("x", same, same, range(10)).verdict == "not resolved at n=10"
    a = Figure("FD-EffNet", 9.0, 8.9, 9.1, 64, "", {"steps": 50, "weights": "a"})
    b = a._replace(value=5.0, low=4.9, high=5.1, fingerprint={"steps": 50, "weights": "b"})
    assert compare(a, b).resolved
    assert compare(a, b._replace(n=65)).verdict == "not comparable: other n"
    assert compare(a, b._replace(fingerprint={"steps": 20})).verdict == "not comparable: other steps"


def test_the_interval_of_a_difference_covers_the_truth_nineteen_times_in_twenty() -> None:
    def once(trial: int) -> Figure:
        a, b = (draw(stream, 50, 1, trial)[:, 0].numpy() for stream in "ab")
        return compare(mean("x", a + 1.0, range(50)), mean("x", 3 * b, range(50)))

    assert 180 <= covered(200, 1.0, once) <= 199  # as above


# ------------------------------------------------------------------------------------------ too few


def test_too_few_images_are_labelled_or_refused() -> None:
    metric = ImageMetric(Flat(), set_distances)
    metric.update(normal(0, "x", 0, (9, 3, 2, 2)), groups=None)
    metric.update(normal(0, "y", 0, (3, 3, 2, 2)), groups=["a", "b", "c"])
    with pytest.raises(ValueError, match="3 images against 9 real ones: at least 4"):
        metric.compute()
    metric.update(normal(0, "z", 0, (3, 3, 2, 2)), groups=["d", "e", "f"])
    found = figures(metric, {"steps": 50})
    assert str(found["FD-EffNet"]).endswith("[n=6 < 2048: biased upwards]")
    assert found["recall-EffNet"].note == "n=6 < 1000: compare at equal n alone"
    assert found["KID-EffNet"].note == ""
    assert found["KID-EffNet"].fingerprint == {"steps": 50, "n": 6}


# ------------------------------------------------------------------------------------------ ranks


def metrics() -> list[ImageMetric]:
    return [
        ImageMetric(Flat(), set_distances),
        ImageMetric(Flat(), diversity),
        ImageMetric(lambda x: x.flatten(1)[:, :2], means(("first", "second"))),
    ]


def fill(rank: int, world: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for metric in metrics():
        for i in range(rank, 12, world):  # unequal shares: 4 of the 12 batches have one image less
            fake = normal(0, "fake", i, (5 - i % 3 // 2, 3, 2, 2)) + 0.5
            metric.update(fake, groups=[f"prompt {k}" for k in range(len(fake))])
            if metric.reduce is set_distances:
                metric.update(normal(0, "real", i, (5, 3, 2, 2)), groups=None)
        found |= metric.compute()
    return found


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(fill(rank, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_the_values_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)
    alone = fill(0, 1)
    assert {"FD-EffNet", "KID-EffNet_low", "recall-EffNet_n", "diversity-EffNet", "second_high"} <= alone.keys()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            # float64 sums in another order
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
