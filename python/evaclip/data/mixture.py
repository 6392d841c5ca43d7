"""Training batches from shards: which samples a step sees, and their pixels and token ids."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaclip.data.common import DataError, check_unreadable, counter_random, share
from evaclip.data.order import WINDOW, EpochOrder, ResampledOrder, apportioned
from evaclip.data.preprocess import Decode, ImageError, ImageTransform
from evaclip.data.shards import Shards
from evaclip.data.video import video_frames

TRIES = 100  # samples in a row that may be unreadable
STREAMS = 16  # of `counter_random`: from here on, three for each data set

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A place in a batch."""

    set: int  # the data set
    position: int  # in its order
    stride: int  # from here to the same place in the next batch


@dataclass
class Tally:
    """What reading went through: samples tried, those that failed with reasons by name, and the names of those read.

    Shards that are not whole, and why, are told with the first samples read after that was found.
    """

    tried: int = 0
    failed: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    shards: dict[str, str] = field(default_factory=dict)


class Mixture:
    """Batches of one or several data sets in shards, in an order that depends on (seed, step) alone.

    The batch of a step has the same samples whatever the number of processes that share it, and of readers in these:
    each takes its part. A batch holds of each data set what its weight says, to a sample or two, and over the run
    exactly. Within it samples are sorted by data set and shard, so that each part touches few shards.

    What cannot be read is replaced by the sample at the same place in the next batch, or in the one after that.

    Args:
        sets: data sets, all of images or all of videos.
        weights: of the sets, above 0, in any unit.
        batch_size: samples of a step, over all ranks.
        seed: of order, captions and crops, 0 to 2^64 - 1.
        transform: of mode "train".
        tokenizer: from captions to ids (n, context).
        mode: "epoch" sees every sample of a set once before any twice; a batch that spans the end of an epoch may hold
            a sample twice. "resampled" draws shards anew for each window, and has to know only those it draws.
        decode: "exact", or "fast" (see `ImageTransform.random_pixels`).
        frames: 0 for images; else frames of a video, evenly spread.
        rank, world: of `world` processes that share each batch, this is number `rank`.

    Raises:
        ValueError: a data set has fewer samples than a batch takes of it.
        DataError: a shard cannot be read.
    """

    def __init__(
        self,
        sets: Sequence[Shards],
        batch_size: int,
        *,
        seed: int,
        transform: ImageTransform,
        tokenizer: Callable[[list[str]], Tensor],
        weights: Sequence[float] | None = None,
        mode: Literal["epoch", "resampled"] = "epoch",
        decode: Decode = "fast",
        frames: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.sets, self.weights, self.batch_size, self.seed = (
            list(sets),
            list(weights or [1] * len(sets)),
            batch_size,
            seed,
        )
        self.transform, self.tokenizer, self.decode, self.frames = transform, tokenizer, decode, frames
        self.rank, self.world = rank, world
        most = [n + 2 for n in apportioned(batch_size, self.weights)]
        self.orders = [self._order(number, mode, count) for number, count in enumerate(most)]

    def _order(self, number: int, mode: str, most: int) -> EpochOrder | ResampledOrder:
        """The order of a data set of which a batch takes at most `most`; its windows hold several batches."""
        shards, stream = self.sets[number], STREAMS + 3 * number
        if mode == "resampled":
            visit = max(1, len(shards.samples(0)))
            window = max(WINDOW, -(-4 * most // visit))
            return ResampledOrder(len(shards), visit, shards.count, seed=self.seed, stream=stream, window=window)
        counts = shards.counts()
        total = int(counts.sum())
        least = apportioned(self.batch_size, self.weights)[number]
        if total < max(1, least):
            mend = "make batches smaller" if total else "`evaclip data check` tells what it holds"
            raise ValueError(
                f"{shards.source} has {total} samples with {'a video' if self.frames else 'an image'} and a caption, "
                f"but a batch of {self.batch_size} takes {least} of it; {mend}"
            )
        window = max(WINDOW, -(-4 * most * len(shards) // total))
        return EpochOrder(counts, seed=self.seed, stream=stream, window=window)

    @property
    def size(self) -> int:
        """Samples of this rank's part of a batch."""
        return len(range(self.batch_size)[share(self.batch_size, self.rank, self.world)])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, H, W) of a sample's pixels; (frames, channels, H, W) of a video's."""
        shape = (self.transform.channels, *self.transform.size)
        return (self.frames, *shape) if self.frames else shape

    def places(self, step: int, part: int = 0, parts: int = 1) -> list[Place]:
        """The places of this rank's share of a step's batch, or of one of several parts of that share."""
        first, end = (apportioned(s * self.batch_size, self.weights) for s in (step, step + 1))
        owners, shards, positions = [], [], []
        for number, (a, b) in enumerate(zip(first, end, strict=True)):
            of_set = np.arange(a, b)
            owners.append(np.full(b - a, number))
            positions.append(of_set)
            shards.append(self.orders[number].shards(of_set))
        position, shard, owner = map(np.concatenate, (positions, shards, owners))
        mine = np.lexsort((position, shard, owner))[share(self.batch_size, self.rank, self.world)]
        mine = mine[share(len(mine), part, parts)]
        stride = np.subtract(end, first)[owner]
        return [Place(*place) for place in zip(*(a[mine].tolist() for a in (owner, position, stride)), strict=True)]

    def read(self, step: int, images: Tensor, ids: Tensor, part: int = 0, parts: int = 1) -> Tally:
        """Read this rank's share of a step's batch, or a part of it.

        Args:
            images: (n, *image_shape) uint8, and
            ids: (n, context) int64, of the whole share: the part's rows are written.

        Returns:
            what was read, and what could not be.

        Raises:
            DataError: a caption cannot be tokenized, or `TRIES` samples in a row cannot be read.
        """
        tally = Tally()
        rows = range(len(images))[share(len(images), part, parts)]
        for row, place in zip(rows, self.places(step, part, parts), strict=True):
            pixels, caption, name = self._sample(place, tally)
            images[row] = torch.from_numpy(pixels)
            tally.names.append(name)
            try:
                ids[row] = self.tokenizer([caption])[0]
            except ValueError as error:
                raise DataError(f"{name}: {error}") from error
        for shards in self.sets:
            tally.shards |= shards.problems
            shards.problems.clear()
        return tally

    def _sample(self, place: Place, tally: Tally) -> tuple[np.ndarray, str, str]:
        shards, order = self.sets[place.set], self.orders[place.set]
        for attempt in range(TRIES):
            shard, number = order.sample(place.position + attempt * place.stride)
            tally.tried += 1
            name = shards.urls[shard]
            try:
                if not 0 <= number < shards.count(shard):
                    raise ValueError("the shard is empty, or no longer what it was")
                sample = shards.samples(shard)[number]
                name = shards.name(shard, sample)
                data, captions = shards.read(shard, sample)
                random = counter_random(self.seed, STREAMS + 3 * place.set + 2, place.position, attempt)
                caption = captions[random.integers(len(captions))]
                return self._pixels(data, sample.media_suffix, random, name), caption, name
            except (OSError, EOFError, ValueError) as error:
                tally.failed += 1
                reason = str(error) if isinstance(error, ImageError) else f"cannot read the sample {name}: {error}"
                tally.unreadable[name] = reason
        raise DataError(f"{TRIES} samples in a row cannot be read, the last one {name}: {reason}")

    def _pixels(self, data: bytes, suffix: str, random: np.random.Generator, name: str) -> np.ndarray:
        if not self.frames:
            return self.transform.random_pixels(data, random, decode=self.decode, name=name)
        frames = video_frames(data, suffix, self.frames, channels=self.transform.channels, name=name)
        return self.transform.random_clip(frames, random)


class Unreadable(dict[str, str]):
    """Reasons by name of what could not be read; each is logged once, and more than a share of all is an error."""

    def __init__(self, limit: float):
        super().__init__()
        self.limit, self.tried, self.failed = limit, 0, 0
        self.shards: dict[str, str] = {}

    def add(self, tally: Tally) -> None:
        """Count what a reader went through; DataError where too much of it failed."""
        self.tried, self.failed = self.tried + tally.tried, self.failed + tally.failed
        for url, problem in tally.shards.items():
            if url not in self.shards:
                log.warning("%s: %s; what is whole of it is read", url, problem)
        self.shards |= tally.shards
        for name, reason in tally.unreadable.items():
            if name not in self:
                log.warning("%s; another sample takes its place", reason)
        self |= tally.unreadable
        check_unreadable("shards", self, self.failed, self.tried, self.limit)
