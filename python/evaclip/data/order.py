"""Which sample comes when: functions of (seed, position), so that nothing has to be remembered to continue a run.

A data set's samples come at positions 0, 1, 2 ... An order tells the shard of many positions at once, cheaply, and
the sample of one. Within a window of shards every sample is as likely to come next to any other; windows are made
of shards drawn from all of them.
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from evaclip.data.common import Recent, counter_random

WINDOW = 16  # shards, or more where batches are large


class EpochOrder:
    """Every sample once per epoch: shards in a random order, then the samples of each window of shards shuffled.

    Args:
        counts: samples of each shard; together at least one.
        seed, stream: of `counter_random`; the order takes the streams `stream` and `stream + 1`.
        window: shards that are shuffled together.
    """

    def __init__(self, counts: np.ndarray, *, seed: int, stream: int, window: int = WINDOW):
        self.counts, self.seed, self.stream = np.asarray(counts, dtype=np.int64), seed, stream
        self.total, self.window = int(self.counts.sum()), window
        self._epoch = Recent(self._shuffled_shards, 2)
        self._window = Recent(self._shuffled_window, 4)

    def shards(self, positions: np.ndarray) -> np.ndarray:
        """The shards (n,) of positions (n,)."""
        found = np.empty(len(positions), dtype=np.int64)
        epochs, places = np.divmod(positions, self.total)
        for epoch in np.unique(epochs).tolist():
            of_epoch = np.flatnonzero(epochs == epoch)
            _, ends = self._epoch(epoch)
            windows = np.searchsorted(ends, places[of_epoch], "right")
            for window in np.unique(windows).tolist():
                here = of_epoch[windows == window]
                shards, offsets, samples = self._window(epoch, window)
                at = samples[places[here] - (ends[window - 1] if window else 0)]
                found[here] = shards[np.searchsorted(offsets, at, "right") - 1]
        return found

    def sample(self, position: int) -> tuple[int, int]:
        """The shard of a position, and the number of the sample in it."""
        epoch, place = divmod(position, self.total)
        _, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, place, "right"))
        shards, offsets, samples = self._window(epoch, window)
        at = samples[place - (ends[window - 1] if window else 0)]
        slot = int(np.searchsorted(offsets, at, "right")) - 1
        return int(shards[slot]), int(at - offsets[slot])

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and where each window ends."""
        order = counter_random(self.seed, self.stream, epoch).permutation(len(self.counts))
        return order, np.cumsum(np.add.reduceat(self.counts[order], np.arange(0, len(order), self.window)))

    def _shuffled_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The shards of a window, where each begins among its samples, and these in random order."""
        shards = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
        counts = self.counts[shards]
        random = counter_random(self.seed, self.stream + 1, epoch, window)
        return shards, np.cumsum(counts) - counts, random.permutation(int(counts.sum()))


class ResampledOrder:
    """Shards drawn anew for each window, all different within it; it takes samples from its shards in turn.

    Only the shards that are drawn have to be known. A window takes `visit` samples of each of its shards, in a random
    order, and begins again in another order where a shard has less.

    Args:
        shards: how many there are.
        visit: samples that a window takes of each shard.
        count: the samples of a shard.
        seed, stream: as in `EpochOrder`.
        window: shards drawn together.
    """

    def __init__(
        self, shards: int, visit: int, count: Callable[[int], int], *, seed: int, stream: int, window: int = WINDOW
    ):
        self.total, self.visit, self.count, self.seed, self.stream = shards, visit, count, seed, stream
        self.window = min(window, shards)
        self._window = Recent(self._drawn, 4)
        self._shard = Recent(self._shuffled, 4 * self.window)

    def shards(self, positions: np.ndarray) -> np.ndarray:
        """The shards (n,) of positions (n,)."""
        found = np.empty(len(positions), dtype=np.int64)
        windows, places = np.divmod(positions, self.window * self.visit)
        for window in np.unique(windows).tolist():
            here = windows == window
            found[here] = self._window(window)[places[here] % self.window]
        return found

    def sample(self, position: int) -> tuple[int, int]:
        """The shard of a position, and the number of the sample in it; -1 where the shard is empty."""
        window, place = divmod(position, self.window * self.visit)
        turn, slot = divmod(place, self.window)
        shard = int(self._window(window)[slot])
        if not (count := self.count(shard)):
            return shard, -1
        again, at = divmod(turn, count)
        return shard, int(self._shard(window, slot, again)[at])

    def _drawn(self, window: int) -> np.ndarray:
        random = counter_random(self.seed, self.stream, window)
        return random.choice(self.total, self.window, replace=False)

    def _shuffled(self, window: int, slot: int, again: int) -> np.ndarray:
        count = self.count(int(self._window(window)[slot]))
        return counter_random(self.seed, self.stream + 1, window, slot << 32 | again).permutation(count)


def apportioned(total: int, weights: list[float]) -> list[int]:
    """How many of the first `total` samples of a mixture come from each data set, in proportion to its weight.

    Whole numbers that add up to `total` and never fall as it grows; each is within two of its exact share per data
    set before it. So each sample of a run belongs to one data set, whatever the batch size.
    """
    shares, left, rest = [], total, sum(map(Fraction, weights))
    for weight in map(Fraction, weights):
        share = left * weight // rest if rest else 0
        shares.append(int(share))
        left, rest = left - int(share), rest - weight
    return shares
