"""Real handwriting with written-out captions: digits side by side, "seven zero three"."""

from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from evaclip.data.common import counter_random, extra, share
from evaclip.data.tokenizer import WordTokenizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8  # pixels of one digit, each way


class Digits:
    """Handwritten numbers and their names, from the 1,797 digits that scikit-learn carries.

    Two things are held out: a fixed part of all 10**length numbers, and 20 % of the handwriting of each digit. Neither
    split depends on `seed`, so runs of different seeds are tested on the same images.

    Args:
        batch_size: samples per batch; at most the number of training numbers, as no caption comes twice in a batch.
        seed: of the order of the batches, 0 to 2^64 - 1.
        length: digits per number, 1 to 6.
        train_fraction: share of all numbers that is trained on.
        shift: each training digit moves by up to so many pixels both ways, 0 to 1, with linear interpolation: there
            are 1,437 of them, too few to tell a hand from a place.
        rank, world: of `world` processes that share each batch, this is number `rank`.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: an argument is out of its range.

    Source: E. Alpaydin and C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        length: int = 3,
        train_fraction: float = 0.5,
        shift: float = 0.35,
        rank: int = 0,
        world: int = 1,
    ):
        if not 1 <= length <= 6:
            raise ValueError(f"Digits: length is {length}; numbers of 1 to 6 digits can be written")
        if not 0 < train_fraction <= 1:
            raise ValueError(f"Digits: train_fraction is {train_fraction}; it must be above 0 and at most 1")
        numbers = np.random.default_rng(0).permutation(10**length)
        trained = round(train_fraction * len(numbers))
        if not 1 <= batch_size <= trained:
            raise ValueError(
                f"Digits: batch_size is {batch_size}, but there are {trained} training numbers of {length} digits and "
                "no caption comes twice in a batch; choose a smaller batch or a greater length"
            )
        if not 0 <= shift <= 1:
            raise ValueError(f"Digits: shift is {shift}; digits move by 0 to 1 pixels")
        self.batch_size, self.seed, self.length, self.shift = batch_size, seed, length, shift
        self.share = share(batch_size, rank, world)
        self.train_numbers, self.test_numbers = np.sort(numbers[:trained]), np.sort(numbers[trained:])
        self._train, self._test = _handwriting()
        self._powers = 10 ** np.arange(length - 1, -1, -1)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return SIDE, SIDE * self.length

    @cached_property
    def captions(self) -> list[str]:
        """All 10**length captions in numeric order: `captions[703]` is "seven zero three"."""
        return self._written(self._digits(np.arange(10**self.length)))

    def tokenizer(self) -> WordTokenizer:
        """The tokenizer of the ten words: 13 ids, and room for start, `length` words and end."""
        return WordTokenizer(WORDS, context=self.length + 2)

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """This rank's part of the batch of a step: distinct training numbers in random training handwriting.

        Returns:
            images (b, 1, 8, 8 * length) float32 in [-1, 1], and b captions; a function of (seed, step) alone.
        """
        random = counter_random(self.seed, 0, step)
        digits = self._digits(random.choice(self.train_numbers, self.batch_size, replace=False))
        return self._train.write(digits, random, self.shift)[self.share], self._written(digits[self.share])

    def video(self, step: int, frames: int) -> tuple[Tensor, list[str]]:
        """As `batch`, but each number is written `frames` times, each time in another handwriting.

        Returns:
            images (B, frames, 1, 8, 8 * length) float32 in [-1, 1], and B captions; a function of (seed, step) alone.
        """
        random = counter_random(self.seed, 1, step)
        digits = self._digits(random.choice(self.train_numbers, self.batch_size, replace=False))
        images = self._train.write(digits.repeat(frames, axis=0), random, self.shift)
        return images.unflatten(0, (-1, frames))[self.share], self._written(digits[self.share])

    def held_out(self, count: int = 1000) -> tuple[Tensor, list[str]]:
        """Numbers never trained on, in handwriting never trained on; the same for every seed.

        Args:
            count: images; every unseen number comes once before any comes twice, in handwriting drawn anew.

        Returns:
            images (count, 1, 8, 8 * length) float32 in [-1, 1], and their captions.

        Raises:
            ValueError: nothing was held out.
        """
        if not len(self.test_numbers):
            raise ValueError("Digits.held_out: train_fraction is 1, so that no number is held out; give less")
        random = np.random.default_rng(1)
        order = random.permutation(self.test_numbers)
        digits = self._digits(np.resize(order, count))
        return self._test.write(digits, random), self._written(digits)

    def _digits(self, numbers: np.ndarray) -> np.ndarray:
        return numbers[:, None] // self._powers % 10

    def _written(self, digits: np.ndarray) -> list[str]:
        return [" ".join([WORDS[d] for d in row]) for row in digits.tolist()]


class _Hand:
    """Images of single digits, sorted by digit, to write numbers with."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        order = np.argsort(labels, kind="stable")
        self.images = images[order]
        self.counts = np.bincount(labels, minlength=10)
        self.starts = np.cumsum(self.counts) - self.counts

    def write(self, digits: np.ndarray, random: np.random.Generator, shift: float = 0) -> Tensor:
        """(B, L) digits, each in a handwriting of its own and shifted by itself -> (B, 1, 8, 8 L)."""
        pick = self.starts[digits] + (random.random(digits.shape) * self.counts[digits]).astype(np.int64)
        images = self.images[pick]
        if shift:
            images = _shifted(images, random.uniform(-shift, shift, (2, *digits.shape)).astype(np.float32))
        count, length = digits.shape
        return torch.from_numpy(images.transpose(0, 2, 1, 3).reshape(count, 1, SIDE, SIDE * length))


def _shifted(images: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """(..., 8, 8) images moved by (2, ...) pixels down and right, at most 1; what comes in is background."""
    for axis, by in zip((-2, -1), pixels[..., None], strict=True):
        wide = np.pad(np.moveaxis(images, axis, 0), [(1, 1)] + [(0, 0)] * (images.ndim - 1), constant_values=-1)
        moved = np.maximum(by, 0) * wide[:-2] + (1 - abs(by)) * wide[1:-1] + np.maximum(-by, 0) * wide[2:]
        images = np.moveaxis(moved, 0, axis)
    return images


@cache
def _handwriting() -> tuple[_Hand, _Hand]:
    what = "the digits data set"
    data = extra("sklearn.datasets", "scikit-learn", what).load_digits()
    split = extra("sklearn.model_selection", "scikit-learn", what).train_test_split
    images = (data.images / 8 - 1).astype(np.float32)  # 0 .. 16 -> -1 .. 1
    train, test = split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=data.target)
    return _Hand(images[train], data.target[train]), _Hand(images[test], data.target[test])
