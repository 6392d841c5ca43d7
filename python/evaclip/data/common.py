"""What the data sources share: optional packages, and random numbers that depend on a place alone."""

import importlib
from types import ModuleType

import numpy as np


class DataError(RuntimeError):
    """Data that became unusable while it was read; the message names the files."""


def extra(module: str, package: str, what: str) -> ModuleType:
    """Import a module of an optional package, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}: pip install 'evakernels[train]'") from error


def counter_random(seed: int, stream: int, place: int, sample: int = 0) -> np.random.Generator:
    """A generator that is a function of its four arguments (each 0 to 2^64 - 1), with no two of them overlapping.

    Source: Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    for name, value in {"seed": seed, "place": place, "sample": sample}.items():
        if not 0 <= value < 2**64:
            raise ValueError(f"a random {name} of {value} was given; it must lie between 0 and 2^64 - 1")
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, place, sample], dtype=np.uint64)))
