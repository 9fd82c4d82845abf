from __future__ import annotations

import numpy as np
import torch

from ldm import randomness


def test_bits_are_philox_and_will_never_change() -> None:
    # Written down once: a release of NumPy that changed them would fail here.
    assert randomness.bits(0, "noise", 0, 2).tolist() == KNOWN
    assert randomness.bits(2**64, "noise", 0, 2).tolist() == KNOWN


def test_seed_stream_and_position_each_give_other_numbers() -> None:
    first = randomness.bits(0, "noise", 0, 4)
    for other in ((1, "noise", 0), (0, "order", 0), (0, "noise", 1), (-1, "noise", 0)):
        assert not np.intersect1d(first, randomness.bits(*other, 4)).size


def test_positions_never_overlap() -> None:
    long = randomness.bits(3, "noise", 5, 100_000)
    assert not np.intersect1d(long, randomness.bits(3, "noise", 6, 1000)).size


def test_normals_have_the_moments_and_tails_of_a_normal_distribution() -> None:
    x = randomness.normal(0, "test", 0, (1_000_000,)).double()
    # Standard errors at a million: 0.001, 0.0007·√2, 0.005 of the fourth moment.
    assert abs(x.mean()) < 0.004
    assert abs(x.var() - 1) < 0.006
    assert abs((x**4).mean() - 3) < 0.04
    assert 4.3 < x.abs().max() < 6.5


def test_normals_of_a_shape_begin_like_no_others_and_odd_counts_work() -> None:
    assert randomness.normal(0, "a", 0, (3, 5)).shape == (3, 5)
    assert randomness.normal(0, "a", 0, ()).shape == ()
    assert randomness.normal(0, "a", 0, (2, 2)).dtype == torch.float32


def test_integers_are_in_range_and_uniform() -> None:
    drawn = [randomness.integer(0, "timestep", p, 10) for p in range(5000)]
    counts = np.bincount(drawn, minlength=10)
    assert len(counts) == 10
    assert (np.abs(counts - 500) < 5 * np.sqrt(450)).all()  # five standard deviations


KNOWN = [17489529488533418800, 9110941997681468719]
