"""Where a recipe's samples come from: `batch(step)` is a function of (seed, step), so a run can continue anywhere."""

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
from evaclip.train.recipe import Recipe, RecipeError


class Source(Protocol):
    """What the trainer asks of a data set."""

    tokenizer: Callable[[list[str]], Tensor]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Normalised images (b, C, H, W) and token ids (b, context) of a step, counted from 0: this process's share."""
        ...


class Tokenized:
    """A data set of images and captions as a source; the next batch is read while a step computes."""

    def __init__(
        self, batches: Digits | CaptionBatches, tokenizer: Callable[[list[str]], Tensor], share: slice, ahead: bool
    ):
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


def open_source(recipe: Recipe, config: ClipConfig, ranks: Ranks) -> Source:
    """The data set a recipe names, for the image size and context of a model, and this process's share of it.

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
    if data.source == "digits":
        return Tokenized(Digits(data.batch_size, seed=seed), tokenizer, share, ahead=False)
    if not Path(data.source).exists():
        raise RecipeError(
            f'data.source {data.source!r} does not exist; give "digits", a folder, or a CSV/TSV/JSONL file'
        )
    vision = config.vision
    transform = image_transform(vision.image_size, mode="train", channels=vision.channels)
    pairs, limit = ImageCaptions(data.source), data.max_unreadable
    batches = CaptionBatches(pairs, data.batch_size, seed=seed, transform=transform, max_unreadable=limit)
    return Tokenized(batches, tokenizer, share, ahead=True)
