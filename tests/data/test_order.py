"""The global order is a permutation every epoch, and a pure function of (seed, position)."""

import numpy as np
import pytest

from ldm.data import Order, WindowedOrder

PINNED = [5, 8, 2, 0, 1, 7, 9, 3, 4, 6, 4, 6, 1, 0, 8, 9, 2, 7, 3, 5]
PINNED_LARGE = 51755914


def ids(order: Order, stop: int, start: int = 0) -> np.ndarray:
    return np.array([order[position] for position in range(start, stop)])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 200, 1000])
@pytest.mark.parametrize("seed", [0, 1, -7])
def test_every_epoch_has_every_sample_once(n: int, seed: int) -> None:
    order = Order(n, seed)
    for epoch in range(3):
        assert sorted(ids(order, (epoch + 1) * n, epoch * n)) == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    first = ids(Order(500, 0), 1000)
    assert (first[:500] == first[500:]).mean() < 0.02  # 1/500 expected
    assert (first == ids(Order(500, 1), 1000)).mean() < 0.02


def test_samples_land_everywhere_equally_often() -> None:
    n, epochs = 20, 2000
    places = ids(Order(n, 5), n * epochs).reshape(epochs, n)
    counts = np.stack([np.bincount(places[:, place], minlength=n) for place in range(n)])  # (place, sample)
    chi_squared = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    assert abs(chi_squared - (n - 1) ** 2) < 5 * np.sqrt(2 * (n - 1) ** 2)  # five standard deviations


def test_neighbours_in_an_epoch_are_not_neighbours_in_the_data() -> None:
    numbers = ids(Order(4096, 0), 4096).astype(float)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / np.sqrt(4096)
    assert abs(np.corrcoef(numbers, np.arange(4096))[0, 1]) < 5 / np.sqrt(4096)


def test_the_order_does_not_change_with_releases() -> None:
    assert ids(Order(10, 0), 20).tolist() == PINNED
    assert Order(10**9, 42)[123_456_789_012] == PINNED_LARGE


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        Order(0, 0)


# --------------------------------------------------------------------------------------------------------------------
# Windows of shards

COUNTS = [5, 1, 9, 3, 7, 7, 2]
PINNED_WINDOWED = [17, 16, 13, 33, 8, 7]
PINNED_WINDOWED_LARGE = 60084194


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("seed", [0, 5])
def test_every_epoch_of_a_windowed_order_has_every_sample_once(window: int, seed: int) -> None:
    order, n = WindowedOrder(COUNTS, window, seed), sum(COUNTS)
    for epoch in range(3):
        assert sorted(order[p] for p in range(epoch * n, (epoch + 1) * n)) == list(range(n))


def test_any_position_can_be_read_first() -> None:
    order, n = WindowedOrder(COUNTS, 2, 1), sum(COUNTS)
    forwards = [order[p] for p in range(3 * n)]
    assert [WindowedOrder(COUNTS, 2, 1)[p] for p in range(3 * n)] == forwards
    assert [order[p] for p in reversed(range(3 * n))][::-1] == forwards


def test_a_window_holds_whole_shards_and_no_others() -> None:
    counts, window = [10] * 12, 3
    order = WindowedOrder(counts, window, 0)
    seen = []
    for start in range(0, 120, 30):
        shards = [order[p] // 10 for p in range(start, start + 30)]
        assert len(set(shards)) == window
        assert shards != sorted(shards)  # mixed within
        seen += sorted(set(shards))
    assert sorted(seen) == list(range(12))
    assert seen != sorted(seen)  # the shards are mixed too


def test_windows_epochs_and_seeds_differ() -> None:
    n = 400
    first = [WindowedOrder([40] * 10, 5, 0)[p] for p in range(2 * n)]
    other = [WindowedOrder([40] * 10, 5, 1)[p] for p in range(n)]
    for a, b in ((first[:n], first[n:]), (first[:n], other)):
        assert np.mean(np.array(a) == np.array(b)) < 0.03  # 1/200 expected within a window
    rows = [[i % 40 for i in first[start : start + 200]] for start in (0, 200)]
    assert np.mean(np.array(rows[0]) == np.array(rows[1])) < 0.12  # 1/40 expected


def test_the_windowed_order_does_not_change_with_releases() -> None:
    assert [WindowedOrder(COUNTS, 3, 0)[p] for p in range(6)] == PINNED_WINDOWED
    assert WindowedOrder([10_000] * 10_000, 16, 42)[123_456_789_012] == PINNED_WINDOWED_LARGE


def test_a_window_of_no_shards_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.window=0"):
        WindowedOrder(COUNTS, 0, 0)
