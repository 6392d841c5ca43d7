"""Images and captions into WebDataset shards: `evaclip data pack`."""

import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from evaclip.data import tar
from evaclip.data.common import extra
from evaclip.data.folder import CAPTION_COLUMNS, IMAGE_COLUMNS, ImageCaptions
from evaclip.data.shards import IMAGES, VIDEOS, grouped
from evaclip.files import write_text

PLAN = "pack.json"


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What `evaclip data pack SOURCE OUTPUT` can be told."""

    max_samples: int = 10_000
    """Samples in a shard, at most."""
    max_size: int = 1000
    """Megabytes of a shard, at most (a greater sample has one to itself)."""
    seed: int = 0
    """Of the order in which images are packed; a Parquet table keeps its own."""


class Item(NamedTuple):
    """One sample to pack."""

    suffix: str
    size: int  # in bytes
    content: Callable[[], bytes]
    captions: list[str]


def pack(source: Path, output: Path, options: Pack, say: Callable[[str], None] = print) -> tuple[int, int]:
    """Write the images (or videos) and captions of a folder or table into shards 000000.tar, 000001.tar ...

    The same input gives the same bytes. A shard appears under its name when it is whole; packing that was interrupted
    continues with the first that is missing. Several captions of an image are kept beside its first.

    Args:
        source: a folder or a CSV, TSV or JSONL table as in `ImageCaptions`; or a .parquet table whose column image (or
            filepath) holds paths, bytes, or {"bytes", "path"}, and whose column caption (or title) a text or several.
        output: a new folder, or one that a call with the same arguments began.

    Returns:
        shards and samples.

    Raises:
        ValueError: the input cannot be used, or the output belongs to another.
    """
    if options.max_samples < 1 or options.max_size < 1:
        raise ValueError(f"max_samples is {options.max_samples}, max_size {options.max_size}; both are at least 1")
    digest, rows = (_parquet if source.suffix.lower() == ".parquet" else _files)(source, options.seed)
    output.mkdir(parents=True, exist_ok=True)
    _claim(output, {"input": digest, "max_samples": options.max_samples, "max_size": options.max_size})
    items, samples, began = _Items(rows), 0, time.monotonic()
    for number in count():
        path = output / f"{number:06d}.tar"
        if path.exists():
            for _ in grouped(tar.index(path)):
                items.take()
                samples += 1
            continue
        if not items.next:
            break
        unfinished = path.with_name(path.name + ".partial")
        with unfinished.open("wb") as file:
            written = _write(file, items, samples, options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        tar.index(path)  # writes it beside the shard
        samples += written
        say(f"{path}: {written} samples, {samples} in all, {samples / (time.monotonic() - began):.0f} samples/s")
    if not number:
        raise ValueError(f"{source} holds no sample")
    return number, samples


def _claim(output: Path, plan: dict) -> None:
    """Note what the folder is for; ValueError where it is for something else."""
    file = output / PLAN
    if not file.exists():
        if found := sorted(output.glob("*.tar")):
            raise ValueError(
                f"{output} holds shards that `evaclip data pack` did not write ({found[0]}); choose another"
            )
        write_text(file, json.dumps(plan, indent=2) + "\n")
    elif json.loads(file.read_text()) != plan:
        raise ValueError(f"{output} was begun with other images or limits; choose another folder, or empty it")


class _Items:
    """Items to come, the next of which can be looked at."""

    def __init__(self, items: Iterator[Item]):
        self.items = items
        self.next = next(items, None)

    def take(self) -> Item:
        assert self.next is not None
        item, self.next = self.next, next(self.items, None)
        return item


def _write(file: BinaryIO, items: _Items, first: int, options: Pack) -> int:
    """Fill one shard; returns how many samples it took."""
    size = written = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out:
        while items.next and written < options.max_samples:
            captions = items.next.captions
            texts = {"txt": captions[0].encode()}
            if len(captions) > 1:
                texts["captions.json"] = json.dumps({"captions": captions}, ensure_ascii=False).encode()
            size += sum(512 + -(-n // 512) * 512 for n in (items.next.size, *map(len, texts.values())))
            if written and size > options.max_size * 1_000_000:
                break
            item = items.take()
            for suffix, data in ({item.suffix: item.content()} | texts).items():
                member = tarfile.TarInfo(f"{first + written:09d}.{suffix}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
            written += 1
    return written


def _files(source: Path, seed: int) -> tuple[str, Iterator[Item]]:
    pairs = ImageCaptions(source)
    sizes, digest = [], hashlib.sha256(repr(seed).encode())
    for image, captions in zip(pairs.images, pairs.captions, strict=True):
        found = image.stat()
        sizes.append(found.st_size)
        digest.update(repr((os.fspath(image), found.st_size, found.st_mtime_ns, captions)).encode())
    suffixes = [_suffix(image) for image in pairs.images]
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    items = (Item(suffixes[i], sizes[i], pairs.images[i].read_bytes, pairs.captions[i]) for i in order)
    return digest.hexdigest(), items


def _suffix(image: Path) -> str:
    suffix = image.suffix.lower().removeprefix(".")
    if suffix not in (*IMAGES, *VIDEOS):
        raise ValueError(f"{image} is neither an image ({', '.join(IMAGES)}) nor a video ({', '.join(VIDEOS)})")
    return suffix


def _parquet(source: Path, seed: int) -> tuple[str, Iterator[Item]]:
    parquet = extra("pyarrow.parquet", "pyarrow", "reading Parquet", "parquet")
    if not source.is_file():
        raise ValueError(f"{source} does not exist")
    table = parquet.ParquetFile(source)
    columns = table.schema_arrow.names
    image, caption = (
        next((name for name in known if name in columns), "") for known in (IMAGE_COLUMNS, CAPTION_COLUMNS)
    )
    if not image or not caption:
        raise ValueError(
            f"{source} has the columns {', '.join(columns)}; needed are "
            f"{' or '.join(IMAGE_COLUMNS)}, and {' or '.join(CAPTION_COLUMNS)}"
        )
    found = source.stat()
    return repr((os.fspath(source), found.st_size, found.st_mtime_ns)), _rows(source, table, image, caption)


def _rows(source: Path, table, image: str, caption: str) -> Iterator[Item]:
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=[image, caption]):
        for value, text in zip(batch[image].to_pylist(), batch[caption].to_pylist(), strict=True):
            captions = [text] if isinstance(text, str) else text or []
            data = value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
            path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
            if not captions or not all(isinstance(c, str) and c.strip() for c in captions) or not (path or data):
                raise ValueError(f"{source}, row {row}: image {path!r}, caption {text!r}; both are needed")
            if data:
                yield Item(_kind(data, source, row), len(data), partial(bytes, data), captions)
            else:
                file = source.parent / str(path)
                yield Item(_suffix(file), file.stat().st_size, file.read_bytes, captions)
            row += 1


def _kind(data: bytes, source: Path, row: int) -> str:
    """The suffix of a file by its first bytes."""
    for suffix, start in {"jpg": b"\xff\xd8", "png": b"\x89PNG", "gif": b"GIF8", "bmp": b"BM"}.items():
        if data.startswith(start):
            return suffix
    for suffix, magic, at in (("webp", b"WEBP", 8), ("mp4", b"ftyp", 4)):
        if data[at : at + 4] == magic:
            return suffix
    raise ValueError(f"{source}, row {row}: the image is no JPEG, PNG, GIF, BMP, WebP or MP4")
