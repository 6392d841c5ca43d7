"""Orders: every sample once per epoch, no sample twice in a window, shares in proportion."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaclip.data.order import EpochOrder, ResampledOrder, apportioned

COUNTS = np.array([5, 0, 7, 1, 12, 3, 0, 9, 4, 6])


def epoch_order(**options):
    return EpochOrder(COUNTS, **({"seed": 1, "stream": 16, "window": 3} | options))


@pytest.mark.parametrize("window", [1, 3, 16])
@pytest.mark.parametrize("counts", [COUNTS, np.array([0, 0, 3]), np.array([4])])
def test_an_epoch_holds_every_sample_once(window, counts):
    order = EpochOrder(counts, seed=1, stream=16, window=window)
    everything = {(shard, i) for shard, count in enumerate(counts) for i in range(count)}
    epochs = [[order.sample(p) for p in range(e * order.total, (e + 1) * order.total)] for e in range(3)]
    assert all(set(epoch) == everything and len(epoch) == len(everything) for epoch in epochs)
    if len(everything) > 3:
        assert len({tuple(epoch) for epoch in epochs}) == 3


def test_shards_are_those_of_the_samples():
    positions = np.arange(20, 160)
    resampled = ResampledOrder(10, 4, lambda shard: int(COUNTS[shard]), seed=1, stream=16, window=3)
    for order in (epoch_order(), resampled):
        assert order.shards(positions).tolist() == [order.sample(p)[0] for p in positions.tolist()]


def test_a_position_does_not_depend_on_what_was_asked_before():
    forward, backward = epoch_order(), epoch_order()
    positions = range(3 * forward.total)
    assert [forward.sample(p) for p in positions] == [backward.sample(p) for p in reversed(positions)][::-1]


def test_orders_differ_by_seed_and_by_stream():
    first = [epoch_order().sample(p) for p in range(40)]
    for changed in ({"seed": 2}, {"stream": 19}):
        assert [epoch_order(**changed).sample(p) for p in range(40)] != first


def test_samples_of_a_window_are_mixed_and_windows_are_of_random_shards():
    order = EpochOrder(np.full(12, 50), seed=0, stream=16, window=4)
    windows = [order.shards(np.arange(e * 600 + w * 200, e * 600 + (w + 1) * 200)) for e in range(8) for w in range(3)]
    assert all(len(set(w.tolist())) == 4 for w in windows)
    assert len({tuple(sorted(set(w.tolist()))) for w in windows}) > 12
    numbers = {tuple(order.sample(p)[1] for p in range(w * 200, (w + 1) * 200)) for w in range(24)}
    assert len(numbers) == 24  # each window is shuffled in its own way
    runs = [int((np.diff(w) == 0).sum()) for w in windows]  # of a shuffled window a quarter of the neighbours
    assert 30 < np.mean(runs) < 70


def test_a_resampled_window_repeats_no_sample_and_no_shard():
    order = ResampledOrder(30, 10, lambda shard: 10, seed=0, stream=16, window=5)
    windows = [[order.sample(p) for p in range(w * 50, (w + 1) * 50)] for w in range(60)]
    assert all(len(set(w)) == 50 and len({shard for shard, _ in w}) == 5 for w in windows)
    assert all(
        sorted({s for s, _ in w[i : i + 5]}) == sorted({s for s, _ in w}) for w in windows for i in range(0, 50, 5)
    )
    drawn = Counter(shard for w in windows for shard in {shard for shard, _ in w})
    assert sum(drawn.values()) == 300 and len(drawn) == 30 and len(set(drawn.values())) > 1  # with replacement
    small = ResampledOrder(30, 10, lambda shard: 4, seed=0, stream=16, window=5)
    assert len({small.sample(p) for p in range(20)}) == 20  # and a small shard begins anew in another order
    assert [small.sample(p)[1] for p in range(0, 20, 5)] != [small.sample(p)[1] for p in range(20, 40, 5)]


def test_only_the_shards_that_are_drawn_are_counted_and_empty_ones_are_told():
    counted = []
    order = ResampledOrder(1000, 10, lambda shard: counted.append(shard) or shard % 2, seed=0, stream=16, window=5)
    samples = [order.sample(p) for p in range(50)]
    assert len(set(counted)) == 5
    assert all(number == (0 if shard % 2 else -1) for shard, number in samples)


weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


@given(weights, st.integers(0, 10**12), st.integers(0, 300))
def test_shares_add_up_never_fall_and_stay_near_their_weight(weights, total, more):
    shares, later = apportioned(total, weights), apportioned(total + more, weights)
    assert sum(shares) == total and sum(later) == total + more
    assert all(b - a >= 0 for a, b in zip(shares, later, strict=True))
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * Fraction(weight) / sum(map(Fraction, weights))) <= len(weights)


def test_a_mixture_of_four_to_one_is_four_to_one_in_every_batch():
    for step in range(100):
        first, end = apportioned(step * 25, [4, 1]), apportioned((step + 1) * 25, [4, 1])
        assert np.subtract(end, first).tolist() == [20, 5]
    assert apportioned(131072, [4.0, 1.0]) == [104857, 26215]
