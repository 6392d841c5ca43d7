"""What the data sources share: optional packages, shares of a batch, and random numbers of a place alone."""

import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np


class DataError(RuntimeError):
    """Data that became unusable while it was read; the message names the files."""


def extra(module: str, package: str, what: str, group: str | None = "train") -> ModuleType:
    """Import a module of an optional package, or say how to get it: with a group of our extras, or by itself."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = f"'evakernels[{group}]'" if group else package
        raise ImportError(f"{what} needs {package}: pip install {wanted}") from error


def share(count: int, part: int, parts: int) -> slice:
    """The samples of one of several parts of a batch; parts differ by at most one sample, and follow one another."""
    return slice(count * part // parts, count * (part + 1) // parts)


def check_unreadable(who: str, bad: dict, failed: int, tried: int, limit: float) -> None:
    """Raise DataError where ten or more different images are unreadable, and more than the limit of those tried."""
    if len(bad) >= 10 and failed > limit * tried:
        raise DataError(
            f"{who}: {failed} of {tried} images are unreadable, more than {limit:.1%}: {some(bad)}; mend or remove "
            "them, or allow more (data.max_unreadable)"
        )


def some(things: Iterable) -> str:
    """The first three of several things, and how many more there are."""
    names = [str(thing) for thing in things]
    first = ", ".join(islice(names, 3))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


class Recent:
    """A function that keeps its last results; sent to another process it goes without them."""

    def __init__(self, function: Callable, size: int):
        self.function, self.size = function, size
        self.kept: OrderedDict[tuple, Any] = OrderedDict()

    def __call__(self, *arguments):
        if arguments not in self.kept:
            if len(self.kept) == self.size:
                self.kept.popitem(last=False)
            self.kept[arguments] = self.function(*arguments)
        self.kept.move_to_end(arguments)
        return self.kept[arguments]

    def __reduce__(self):
        return Recent, (self.function, self.size)


def counter_random(seed: int, stream: int, place: int, sample: int = 0) -> np.random.Generator:
    """A generator that is a function of its four arguments (each 0 to 2^64 - 1), with no two of them overlapping.

    Source: Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    for name, value in {"seed": seed, "place": place, "sample": sample}.items():
        if not 0 <= value < 2**64:
            raise ValueError(f"a random {name} of {value} was given; it must lie between 0 and 2^64 - 1")
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, place, sample], dtype=np.uint64)))
