"""Where a recipe's samples come from: `batch(step)` is a function of (seed, step), so a run can continue anywhere."""

import dataclasses
from bisect import bisect
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evaclip.data.common import DataError
from evaclip.data.digits import Digits
from evaclip.data.folder import CaptionBatches, ImageCaptions
from evaclip.data.mixture import Mixture
from evaclip.data.preprocess import image_transform
from evaclip.data.readers import Readers
from evaclip.data.shards import Shards, are_shards
from evaclip.data.tar import CACHE
from evaclip.data.tokenizer import get_tokenizer
from evaclip.device import one_thread
from evaclip.models.config import ClipConfig
from evaclip.train.recipe import Data, Recipe, RecipeError

Tokenizer = Callable[[list[str]], Tensor]


class Source(Protocol):
    """What the trainer asks of a data set."""

    tokenizer: Tokenizer

    @property
    def names(self) -> list[str]:
        """What the samples of the last batch are called: shard and key, file, or caption."""
        ...

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (b, C, H, W), or videos (b, frames, C, H, W), and token ids (b, context) of a step.

        Images are normalised, or uint8 for `normalized`. Steps count from 0; b is this rank's part of the batch.
        """
        ...


class Ahead:
    """What a subclass computes for a step; for the one after the one that is asked for in a thread, if at all.

    Args:
        ahead: whether to.
        end: the step after the last one, which is not computed; None where nobody knows it.
        device: the GPU that is the thread's current one.
    """

    def __init__(self, ahead: bool, end: int | None = None, device: torch.device | None = None):
        self.thread = one_thread("evaclip-ahead", device) if ahead else None
        self.end = end
        self.next: tuple[int, Future] | None = None

    def compute(self, step: int) -> Any:
        raise NotImplementedError

    def computed(self, step: int) -> Any:
        if self.thread is None:
            return self.compute(step)
        ready = self.next[1] if self.next and self.next[0] == step else self.thread.submit(self.compute, step)
        more = self.end is None or step + 1 < self.end
        self.next = (step + 1, self.thread.submit(self.compute, step + 1)) if more else None
        return ready.result()


class Tokenized(Ahead):
    """A data set of images and captions as a source; the next batch is read while a step computes."""

    def __init__(self, batches: "Digits | Videos | CaptionBatches", tokenizer: Tokenizer, ahead: bool):
        super().__init__(ahead)
        self.batches, self.tokenizer = batches, tokenizer
        self.names: list[str] = []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        images, ids, self.names = self.computed(step)
        return images, ids

    def compute(self, step: int) -> tuple[Tensor, Tensor, list[str]]:
        images, captions = self.batches.batch(step)
        names = self.batches.names if isinstance(self.batches, CaptionBatches) else captions
        try:
            return images, self.tokenizer(captions), names
        except ValueError as error:
            raise DataError(str(error)) from error


class Videos:
    """The digits as videos: a number, written several times."""

    def __init__(self, digits: Digits, frames: int):
        self.digits, self.frames = digits, frames

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        return self.digits.video(step, self.frames)


class Staged:
    """The sources of a run's stages; a step's batch is that of its stage."""

    def __init__(self, sources: list[Source], firsts: list[int]):
        self.sources, self.firsts, self.tokenizer = sources, firsts, sources[0].tokenizer
        self.names: list[str] = []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        source = self.sources[bisect(self.firsts, step) - 1]
        batch, self.names = source.batch(step), source.names
        return batch


def open_stages(recipe: Recipe, config: ClipConfig, rank: int = 0, world: int = 1) -> Source:
    """The data of all stages of a recipe; arguments and errors as `open_source`, before the first step.

    Stages that read the same data share it: an epoch goes on where one stage ends and the next begins.
    """
    opened: dict[tuple[Data, int], Source] = {}
    sources = []
    for stage in recipe.stages():
        data = dataclasses.replace(stage.data, patch_drop=0.0, undropped_tail=0.0)
        frames = stage.frames if stage.kind == "video" else 0
        if (data, frames) not in opened:
            one = dataclasses.replace(recipe, data=data, phase=())
            opened[data, frames] = open_source(one, config, rank, world, frames=frames)
        sources.append(opened[data, frames])
    return sources[0] if len(opened) == 1 else Staged(sources, [stage.first for stage in recipe.stages()])


def open_source(recipe: Recipe, config: ClipConfig, rank: int = 0, world: int = 1, *, frames: int = 0) -> Source:
    """The data set a recipe names, for the image size and context of a model.

    Args:
        rank, world: of `world` processes that share each batch, this is number `rank`: the batches of all, one after
            the other, are that of one process alone.
        frames: 0 for images; else frames of each video, which must be in shards.

    Raises:
        RecipeError: the data set does not exist, or does not fit the model.
    """
    data, seed = recipe.data, recipe.run.seed
    tokenizer = get_tokenizer(data.tokenizer, config.text.context)
    vocabulary = getattr(tokenizer, "vocabulary_size", config.text.vocabulary)
    if vocabulary > config.text.vocabulary:
        raise RecipeError(
            f"data.tokenizer has {vocabulary} ids, but the text tower of {recipe.model.name} embeds "
            f"{config.text.vocabulary}; override it with --model.text vocabulary {vocabulary}"
        )
    vision = config.vision
    transform = image_transform(vision.image_size, mode="train", channels=vision.channels, scale=data.crop_scale)
    mixed = {mixed.source: mixed.weight for mixed in data.mixture} or {data.source: 1.0}
    if all(are_shards(source) for source in mixed):
        cache = Path(data.cache).expanduser() if data.cache else CACHE
        batches = Mixture(
            [Shards(source, cache=cache, room=int(data.cache_gb * 1e9), video=frames > 0) for source in mixed],
            data.batch_size,
            weights=list(mixed.values()),
            seed=seed,
            transform=transform,
            tokenizer=tokenizer,
            mode=data.mode,
            decode=data.decode,
            frames=frames,
            rank=rank,
            world=world,
        )
        return Readers(batches, data.workers, max_unreadable=data.max_unreadable)
    if data.source == "digits" and not data.mixture:
        digits = Digits(data.batch_size, seed=seed, rank=rank, world=world)
        if (vision.channels, vision.image) != (1, digits.image_size):
            raise RecipeError(
                f"the digits are images of 1 x {' x '.join(map(str, digits.image_size))}, but the vision tower of "
                f"{recipe.model.name} takes {vision.channels} x {' x '.join(map(str, vision.image))}; give it those, "
                "or data.source a data set of its own"
            )
        return Tokenized(Videos(digits, frames) if frames else digits, tokenizer, ahead=False)
    if data.mixture or frames:
        what = "data.mixture" if data.mixture else "a video source"
        wrong = next(source for source in mixed if not are_shards(source))
        raise RecipeError(f"{what} is made of .tar shards, which {wrong!r} is not; `evaclip data pack` makes them")
    if not Path(data.source).exists():
        raise RecipeError(
            f'data.source {data.source!r} does not exist; give "digits", a folder, a CSV/TSV/JSONL file, or .tar shards'
        )
    pairs = CaptionBatches(
        ImageCaptions(data.source),
        data.batch_size,
        seed=seed,
        transform=transform,
        workers=max(1, data.workers),
        max_unreadable=data.max_unreadable,
        rank=rank,
        world=world,
    )
    return Tokenized(pairs, tokenizer, ahead=True)
