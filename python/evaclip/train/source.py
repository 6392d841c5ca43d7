"""Where a recipe's samples come from: `batch(step)` is a function of (seed, step), so a run can continue anywhere."""

import dataclasses
from bisect import bisect
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from torch import Tensor

from evaclip.data.common import DataError
from evaclip.data.digits import Digits
from evaclip.data.folder import CaptionBatches, ImageCaptions
from evaclip.data.preprocess import image_transform
from evaclip.data.tokenizer import get_tokenizer
from evaclip.models.config import ClipConfig
from evaclip.train.ranks import Ranks
from evaclip.train.recipe import Data, Recipe, RecipeError

Tokenizer = Callable[[list[str]], Tensor]


class Source(Protocol):
    """What the trainer asks of a data set."""

    tokenizer: Tokenizer

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised images (b, C, H, W), or videos (b, frames, C, H, W), and token ids (b, context) of a step.

        Steps count from 0; b is this process's share of the batch.
        """
        ...


class Tokenized:
    """A data set of images and captions as a source; the next batch is read while a step computes."""

    def __init__(self, batches: "Digits | Videos | CaptionBatches", tokenizer: Tokenizer, share: slice, ahead: bool):
        self.batches, self.tokenizer, self.share = batches, tokenizer, share
        self.reader = ThreadPoolExecutor(1, "evaclip-reader") if ahead else None
        self.next: tuple[int, Future] | None = None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        if self.reader is None:
            return self._read(step)
        ready = self.next[1] if self.next and self.next[0] == step else self.reader.submit(self._read, step)
        self.next = step + 1, self.reader.submit(self._read, step + 1)
        return ready.result()

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        images, captions = self.batches.batch(step)
        try:
            return images[self.share], self.tokenizer(captions[self.share])
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

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self.sources[bisect(self.firsts, step) - 1].batch(step)


def open_stages(recipe: Recipe, config: ClipConfig, ranks: Ranks) -> Source:
    """The data of all stages of a recipe; errors as `open_source`, before the first step.

    Stages that read the same data share it: an epoch goes on where one stage ends and the next begins.
    """
    opened: dict[tuple[Data, int], Source] = {}
    sources = []
    for stage in recipe.stages():
        data = dataclasses.replace(stage.data, patch_drop=0.0, undropped_tail=0.0)
        frames = stage.frames if stage.kind == "video" else 0
        if (data, frames) not in opened:
            opened[data, frames] = open_source(
                dataclasses.replace(recipe, data=data, phase=()), config, ranks, frames=frames
            )
        sources.append(opened[data, frames])
    return sources[0] if len(opened) == 1 else Staged(sources, [stage.first for stage in recipe.stages()])


def open_source(recipe: Recipe, config: ClipConfig, ranks: Ranks, *, frames: int = 0) -> Source:
    """The data set a recipe names, for the image size and context of a model, and this process's share of it.

    `frames` is that of videos, 0 for images.

    Raises:
        RecipeError: the data set does not exist, or does not fit the model.
    """
    data, seed, share = recipe.data, recipe.run.seed, ranks.share(recipe.data.batch_size)
    tokenizer = get_tokenizer(data.tokenizer, config.text.context)
    vocabulary = getattr(tokenizer, "vocabulary_size", config.text.vocabulary)
    if vocabulary > config.text.vocabulary:
        raise RecipeError(
            f"data.tokenizer has {vocabulary} ids, but the text tower of {recipe.model.name} embeds "
            f"{config.text.vocabulary}; override it with --model.text vocabulary {vocabulary}"
        )
    if data.mixture:
        names = ", ".join(part.source for part in data.mixture)
        raise RecipeError(f"data.mixture names {names}; give one data.source instead, mixtures cannot be read yet")
    if data.source == "digits":
        digits = Digits(data.batch_size, seed=seed)
        return Tokenized(Videos(digits, frames) if frames else digits, tokenizer, share, ahead=False)
    if frames:
        raise RecipeError(f"a phase is of kind 'video', but {data.source!r} has images; only \"digits\" has videos")
    if not Path(data.source).exists():
        raise RecipeError(
            f'data.source {data.source!r} does not exist; give "digits", a folder, or a CSV/TSV/JSONL file'
        )
    vision = config.vision
    transform = image_transform(vision.image_size, mode="train", channels=vision.channels, scale=data.crop_scale)
    pairs, limit = ImageCaptions(data.source), data.max_unreadable
    batches = CaptionBatches(pairs, data.batch_size, seed=seed, transform=transform, max_unreadable=limit)
    return Tokenized(batches, tokenizer, share, ahead=True)
