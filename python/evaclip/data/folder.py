"""Folders of images: with labels, for evaluation, or with captions, for training."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaclip.data.common import DataError, check_unreadable, counter_random, share, some
from evaclip.data.preprocess import ImageError, ImageTransform, open_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
IMAGE_COLUMNS, CAPTION_COLUMNS = ("image", "filepath"), ("caption", "title")

log = logging.getLogger(__name__)


class ImageFolder:
    """Labelled images: each subfolder of `root` is a class of that name, underscores read as spaces.

    Attributes:
        classes: names, in the order of the subfolders' names.
        images, labels: paths (sorted within a class, deeper folders included) and indices into `classes`.

    Raises:
        ValueError: there are no subfolders, one holds no image, or two have the same class name.
    """

    def __init__(self, root: str | Path):
        root = _folder("ImageFolder", root)
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise ValueError(f"ImageFolder: {root} has no subfolders; each class needs one, named after it")
        self.classes = [folder.name.replace("_", " ") for folder in folders]
        self.images: list[Path] = []
        self.labels: list[int] = []
        for label, (folder, name) in enumerate(zip(folders, self.classes, strict=True)):
            if (first := self.classes.index(name)) != label:
                raise ValueError(f"ImageFolder: {folders[first]} and {folder} are both the class {name!r}; rename one")
            images = _images(folder)
            if not images:
                raise ValueError(f"ImageFolder: {folder} holds no image ({', '.join(EXTENSIONS)}); fill or remove it")
            self.images += images
            self.labels += [label] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self, batch_size: int, transform: ImageTransform, *, workers: int = 4
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, in batches: (b, C, H, W) and labels (b,) int64.

        Raises:
            ImageError: an image cannot be read; a score leaves none out.
        """
        labels = torch.tensor(self.labels)
        return zip(_decoded(self.images, batch_size, transform, workers), labels.split(batch_size), strict=True)


class ImageCaptions:
    """Images with captions: a folder with a .txt beside each image, or a table that names images and captions.

    A .txt holds one caption per line. A table is .csv, .tsv or .jsonl with columns image (or filepath), relative to the
    table's folder, and caption (or title); an image in several rows has several captions, and in JSONL a caption may be
    a list. Folders are listed in sorted order, tables in the order of their rows.

    Attributes:
        images: paths, each once.
        captions: for each image its captions, at least one.

    Raises:
        ValueError: no images, images without captions or without a file, or two images that share a .txt.
    """

    def __init__(self, root_or_table: str | Path):
        path = Path(root_or_table)
        pairs = _from_table(path) if path.is_file() else _from_folder(_folder("ImageCaptions", path))
        if not pairs:
            raise ValueError(f"ImageCaptions: {path} holds no image ({', '.join(EXTENSIONS)})")
        _require(path, "have no caption", [image for image, captions in pairs.items() if not captions])
        self.images, self.captions = list(pairs), list(pairs.values())

    def __len__(self) -> int:
        return len(self.images)

    def flat(self) -> tuple[list[str], Tensor]:
        """All captions in a row, and the index of the image of each (int64): what `retrieval` compares."""
        counts = torch.tensor([len(captions) for captions in self.captions])
        return list(chain(*self.captions)), torch.arange(len(counts)).repeat_interleave(counts)

    def batches(self, batch_size: int, transform: ImageTransform, *, workers: int = 4) -> Iterator[Tensor]:
        """All images in order, in batches (b, C, H, W).

        Raises:
            ImageError: an image cannot be read; a score leaves none out.
        """
        return _decoded(self.images, batch_size, transform, workers)


class CaptionBatches:
    """Training batches of images and captions in an order that depends on (seed, epoch) alone.

    Each epoch is a new permutation; its incomplete last batch is dropped. A sample's caption (one of the image's) and
    crop depend on (seed, epoch, sample). An unreadable image is named in the log, kept in `unreadable` and replaced by
    the sample at the same place in the next batch, or the one after that (behind the end of the permutation, from its
    beginning): by one that does not depend on what others read.

    Args:
        pairs: images and their captions.
        batch_size: at most the number of images.
        seed: of order, captions and crops, 0 to 2^64 - 1.
        transform: from `image_transform`, usually with mode "train".
        workers: decoding threads.
        max_unreadable: share of the images tried that may be unreadable; more is an error, from 10 images on.
        rank, world: of `world` processes that share each batch, this is number `rank` and reads its part.

    Raises:
        ValueError: the batch is empty or larger than the data set.
    """

    def __init__(
        self,
        pairs: ImageCaptions,
        batch_size: int,
        *,
        seed: int,
        transform: ImageTransform,
        workers: int = 4,
        max_unreadable: float = 0.01,
        rank: int = 0,
        world: int = 1,
    ):
        if not 1 <= batch_size <= len(pairs):
            raise ValueError(
                f"CaptionBatches: batch_size is {batch_size}, but there are {len(pairs)} images; "
                f"choose 1 to {len(pairs)}"
            )
        self.pairs, self.batch_size, self.seed, self.transform = pairs, batch_size, seed, transform
        self.max_unreadable, self.share = max_unreadable, share(batch_size, rank, world)
        self.batches_per_epoch = len(pairs) // batch_size
        self.unreadable: dict[Path, str] = {}
        self.names: list[str] = []  # the files of the last batch
        self._tried = bytearray(len(pairs))
        self._pool = ThreadPoolExecutor(workers)
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> tuple[Tensor, list[str]]:
        """This rank's part of a step's batch: images (b, C, H, W) uint8, for `normalized`, and b captions.

        Both are functions of (seed, step) alone.

        Raises:
            DataError: too many images are unreadable, or too few readable ones are left to fill a batch.
        """
        epoch, place = divmod(step, self.batches_per_epoch)
        order = self._permutation(epoch)
        start, end = place * self.batch_size, (place + 1) * self.batch_size
        others = np.concatenate([order[end:], order[:start]])
        places = range(self.batch_size)[self.share]
        wanted = order[start:end][self.share].tolist()
        loaded = self._pool.map(lambda sample: self._load(epoch, sample), wanted)
        pairs = [
            self._readable(epoch, sample, found, chain(others[place :: self.batch_size], others))
            for place, sample, found in zip(places, wanted, loaded, strict=True)
        ]
        images, captions, self.names = (list(column) for column in zip(*pairs, strict=True))
        return torch.stack(images), captions

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, counter_random(self.seed, 0, epoch).permutation(len(self.pairs))
        return self._order[1]

    def _load(self, epoch: int, sample: int) -> tuple[Tensor, str, str] | ImageError:
        self._tried[sample] = 1
        random = counter_random(self.seed, 1, epoch, sample)
        captions = self.pairs.captions[sample]
        caption = captions[random.integers(len(captions))]
        try:
            image = open_image(self.pairs.images[sample], self.transform.channels)
        except ImageError as error:
            return error
        pixels = self.transform.pixels(image, self.transform.box(image, random))
        return torch.from_numpy(pixels), caption, str(self.pairs.images[sample])

    def _readable(
        self, epoch: int, sample: int, loaded: tuple[Tensor, str, str] | ImageError, spare: Iterator
    ) -> tuple[Tensor, str, str]:
        """What was loaded; where that failed, the first of the spare samples that can be."""
        while isinstance(loaded, ImageError):
            self._count(self.pairs.images[sample], loaded)
            sample = int(next(spare, -1))
            if sample < 0:
                raise DataError(
                    f"CaptionBatches: a batch of {self.batch_size} cannot be filled from {len(self.pairs)} images, "
                    f"{len(self.unreadable)} of them unreadable ({some(self.unreadable)}); make batches smaller"
                )
            loaded = self._load(epoch, sample)
        return loaded

    def _count(self, path: Path, error: ImageError) -> None:
        if path in self.unreadable:
            return
        self.unreadable[path] = str(error)
        log.warning("%s; another sample takes its place", error)
        check_unreadable("CaptionBatches", self.unreadable, len(self.unreadable), sum(self._tried), self.max_unreadable)


def _folder(what: str, root: str | Path) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{what}: {root} is no folder" if root.exists() else f"{what}: {root} does not exist")
    return root


def _images(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    seen = (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(seen, key=Path.as_posix)


def _from_folder(root: Path) -> dict[Path, list[str]]:
    pairs: dict[Path, list[str]] = {}
    beside: dict[Path, Path] = {}
    for image in _images(root):
        text = image.with_suffix(".txt")
        if text in beside:
            raise ValueError(f"ImageCaptions: {beside[text]} and {image} share the caption {text}; rename one of them")
        beside[text] = image
        pairs[image] = _captions(_read(text).split("\n")) if text.is_file() else []
    return pairs


def _from_table(table: Path) -> dict[Path, list[str]]:
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows}
    if table.suffix.lower() not in readers:
        raise ValueError(f"ImageCaptions: {table} is neither a folder nor a table ({', '.join(readers)})")
    pairs: dict[Path, list[str]] = {}
    for line, row in readers[table.suffix.lower()](table):
        where = f"ImageCaptions: {table}, line {line}"
        name, caption = _field(where, row, IMAGE_COLUMNS), _field(where, row, CAPTION_COLUMNS)
        captions = caption if isinstance(caption, list) else [caption]
        if not name or not all(isinstance(text, str) for text in (name, *captions)):
            raise ValueError(f"{where}: image {name!r}, caption {caption!r}; a path and a text are needed")
        pairs.setdefault(table.parent / name, []).extend(_captions(captions))
    _require(table, "do not exist", [image for image in pairs if not image.is_file()])
    return pairs


def _csv_rows(table: Path) -> Iterator[tuple[int, dict]]:
    text = _read(table)
    tabs = "\t" in text.partition("\n")[0]  # open_clip's tables are separated by tabs even as .csv
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(
            f"ImageCaptions: {table}, after line {reader.line_num}: {error}; a caption with a quote is written in "
            'quotes, and its own twice: "a ""quoted"" word"'
        ) from error


def _json_rows(table: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(_read(table).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"ImageCaptions: {table}, line {number} is no JSON: {error}") from error
            yield number, row if isinstance(row, dict) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"ImageCaptions: {path} is not UTF-8: {error}; convert it") from error


def _field(where: str, row: dict, names: Sequence[str]) -> Any:
    for name in names:
        if name in row:
            return row[name] or ""
    columns = ", ".join(repr(column) for column in row if column)
    raise ValueError(f"{where} has no column {' or '.join(map(repr, names))}, only {columns or 'none'}")


def _captions(lines: Sequence[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]


def _require(where: Path, what: str, missing: Sequence[Path]) -> None:
    if missing:
        raise ValueError(f"ImageCaptions: {len(missing)} image(s) of {where} {what}: {some(missing)}")


def _decoded(paths: Sequence[Path], batch_size: int, transform: ImageTransform, workers: int) -> Iterator[Tensor]:
    """Decoded batches in order; the next batch is decoded while one is used."""

    def load(path: Path) -> Tensor:
        return transform(open_image(path, transform.channels))

    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(load, path) for path in paths[:batch_size]]
        for start in range(0, len(paths), batch_size):
            following = paths[start + batch_size : start + 2 * batch_size]
            now, ahead = ahead, [pool.submit(load, path) for path in following]
            yield torch.stack([future.result() for future in now])
