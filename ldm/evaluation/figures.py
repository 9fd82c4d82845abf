"""A figure with its interval and its fingerprint, and whether two figures differ at this number of images."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ldm import randomness

Groups = Sequence[Any] | np.ndarray  # of each value; those of one group are not independent


class Figure(NamedTuple):
    """A measured value, or the difference of two; it is written with interval and reservation, never bare."""

    name: str
    value: float
    low: float  # 95 % interval
    high: float
    n: int  # images
    note: str = ""  # why it is not to be taken at its word
    fingerprint: dict[str, Any] = {}  # noqa: RUF012  what it was measured of, and how; never changed
    gain: float | None = None  # of a paired difference: how many times wider the interval of unpaired images is

    def __str__(self) -> str:
        width = self.high - self.low
        places = max(3, 1 - math.floor(math.log10(width))) if width > 0 else 3  # two digits of the width at least
        spread = f"{self.low:.{places}f} to {self.high:.{places}f}" if width > 0 else f"all {self.n} alike"
        text = f"{self.value:.{places}f} ({spread})"
        return f"{text} [{self.note}]" if self.note else text

    @property
    def resolved(self) -> bool:
        """Of a difference: whether its interval leaves out zero, and nothing speaks against comparing."""
        return not self.note and not self.low <= 0.0 <= self.high

    @property
    def verdict(self) -> str:
        """The same in words."""
        return self.note or ("resolved" if self.resolved else f"not resolved at n={self.n}")


def resamplings(groups: Groups, bootstrap: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of m whole groups drawn with replacement, (bootstrap, m), and the group of each value, (n,)."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    m = len(names)
    drawn = (randomness.uniform(seed, "bootstrap", 0, bootstrap * m) * m).astype(np.int64).reshape(bootstrap, m)
    return drawn, group


def mean(name: str, values: np.ndarray, groups: Groups, bootstrap: int = 1000, seed: int = 0) -> Figure:
    """Mean of values (n,) with its 95 % percentile interval, whole groups resampled.

    Efron & Tibshirani, An Introduction to the Bootstrap, 1993, §8.3 and §13.3.
    """
    drawn, group = resamplings(groups, bootstrap, seed)
    total, count = np.bincount(group, values), np.bincount(group)  # (m,)
    low, high = np.quantile(total[drawn].sum(1) / count[drawn].sum(1), [0.025, 0.975])
    return Figure(name, float(values.mean()), float(low), float(high), len(values))


def paired(name: str, a: np.ndarray, b: np.ndarray, groups: Groups) -> Figure:
    """Mean of a - b, measured on the same images, (n,) each."""
    own = mean(name, a - b, groups)
    unpaired = math.hypot(*(one.high - one.low for one in (mean("", a, groups), mean("", b, groups))))
    return own._replace(gain=unpaired / (own.high - own.low) if own.high > own.low else None)


def over_seeds(name: str, values: Sequence[float], rows: np.ndarray | None = None, groups: Groups = ()) -> Figure:
    """Mean over trainings of K seeds with a 95 % interval for other seeds, and for other images where rows are given.

    The half-widths of two intervals are added in quadrature: Student's t over seeds, and over images the bootstrap of
    what each scores on the average over seeds. Of differences between two cells, give the differences seed by seed.

    Args:
        name: of the figure.
        values: one a seed.
        rows: the same image by image, (K, n); None where the figure is one of a whole set.
        groups: of the images, (n,).
    """
    k, value = len(values), float(np.mean(values))
    over = float(stats.t.ppf(0.975, k - 1) * np.std(values, ddof=1) / math.sqrt(k)) if k > 1 else 0.0
    one = Figure(name, value, value, value, k) if rows is None else mean(name, rows.mean(0), groups)
    low, high = value - math.hypot(over, value - one.low), value + math.hypot(over, one.high - value)
    return Figure(name, value, low, high, k if rows is None else rows.size, "" if k > 1 else "one seed")


def compare(a: Figure, b: Figure) -> Figure:
    """a - b of independent images, its interval from theirs (Zou & Donner, Statistics in Medicine 27, 2008, eq. 6).

    Where more than the weights differs in the fingerprints, or n does, nothing is said to be resolved.
    """
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    own, other = {**a.fingerprint, "n": a.n}, {**b.fingerprint, "n": b.n}
    names = sorted(key for key in {*own, *other} - {"weights"} if own.get(key) != other.get(key))
    return Figure(a.name, value, low, high, a.n, f"not comparable: other {', '.join(names)}" if names else "")
