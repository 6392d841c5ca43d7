"""Data sets in WebDataset shards: tar files whose members `<key>.jpg` and `<key>.txt` are a sample."""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from glob import glob, has_magic
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaclip.data import tar
from evaclip.data.common import DataError, Recent, some
from evaclip.data.copies import Copies, is_remote

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff")
VIDEOS = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "gif", "webp")
CAPTIONS = ("captions.json", "txt", "caption")  # the first one counts
OPEN = 64  # shards at once


class Sample(NamedTuple):
    """What a shard's index knows of a sample: places are (offset, bytes)."""

    key: str
    media: tuple[int, int]
    media_suffix: str
    caption: tuple[int, int]
    caption_suffix: str


class Shards:
    """Samples of an image (or a video) and a caption in tar shards, each of which can be read by itself.

    The members of a sample follow one another and share their name up to the first dot after the last slash. The
    caption is `.txt`, or one of the list `captions` in `.captions.json`, if there is one. Samples without image or
    caption are left out; a shard's index is kept beside it, or in the cache.

    Args:
        source: paths of .tar files: one, with {000000..000099} and {a,b}, or *, ? and [] (sorted), several of these
            joined by "::"; a folder of them; or commands `pipe:...` and addresses s3://, gs://, http:// and https://.
            What cannot be read at random is copied into the cache, whole.
        cache: folder of copies and of indexes that find no place beside their shards.
        room: bytes of copies in the cache, or 0 for all (see `Copies`).
        video: look for videos instead of images.

    Attributes:
        urls: the shards.
        samples: a function from a shard's number to its list of `Sample`; DataError where it cannot be read.
        problems: what is wrong with shards that were read as far as they are whole, by name.

    Raises:
        ValueError: a file does not exist, or none matches.
    """

    def __init__(self, source: str, *, cache: Path = tar.CACHE, room: int = 0, video: bool = False):
        self.source, self.cache, self.video = source, cache, video
        self.copies = Copies(cache / "shards", room)
        self.suffixes = VIDEOS if video else IMAGES
        self.urls = expand(source)
        missing = [url for url in self.urls if not is_remote(url) and not os.path.isfile(url)]
        if missing:
            raise ValueError(f"{len(missing)} of the {len(self.urls)} shards {source} do not exist: {some(missing)}")
        self.samples = Recent(self._grouped, OPEN)
        self._files = Recent(self._opened, OPEN)
        self.problems: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.urls)

    def index(self, shard: int) -> tar.TarIndex:
        """All members of a shard; DataError where it cannot be read."""
        try:
            return self._use(shard, lambda path: tar.index(path, self.cache))
        except (OSError, ValueError) as error:
            raise DataError(f"the shard {self.urls[shard]} cannot be read: {error}") from error

    def size(self, shard: int) -> int:
        """A shard's bytes."""
        return self._use(shard, lambda path: path.stat().st_size)

    def count(self, shard: int) -> int:
        """The samples of a shard."""
        return len(self.samples(shard))

    def counts(self) -> np.ndarray:
        """The samples of every shard (shards,), from the cache if the shards are as they were.

        Otherwise all are indexed that have no index yet, and those of elsewhere copied.
        """
        file = self.cache / "counts" / f"{self._digest()}.npy"
        with suppress(OSError, ValueError, EOFError):
            return np.load(file)
        began = told = time.monotonic()
        counts = np.empty(len(self), dtype=np.int64)
        for shard in range(len(self)):
            counts[shard] = len(self._grouped(shard))
            if time.monotonic() > told + 10:
                told = time.monotonic()
                print(f"{self.source}: {shard + 1} of {len(self)} shards indexed, {told - began:.0f} s", flush=True)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
            with partial.open("wb") as out:
                np.save(out, counts)
            os.replace(partial, file)
        return counts

    def _digest(self) -> str:
        """Of all shards' names, sizes and times, and of what a sample is here."""
        digest = hashlib.sha256(repr((self.suffixes, CAPTIONS)).encode())
        for url in self.urls:
            found = None if is_remote(url) else os.stat(url)
            digest.update(repr((os.path.abspath(url), found and (found.st_size, found.st_mtime_ns))).encode())
        return digest.hexdigest()[:32]

    def read(self, shard: int, sample: Sample) -> tuple[bytes, list[str]]:
        """The image's or video's content, and the captions to choose from.

        Raises:
            OSError, EOFError, ValueError: a member cannot be read.
        """
        file = self._files(shard)
        text = tar.read(file.descriptor, *sample.caption).decode("utf-8")
        captions = _listed(text) if sample.caption_suffix == "captions.json" else [text]
        if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            raise ValueError("it has no caption, or an empty one")
        return tar.read(file.descriptor, *sample.media), [c.strip() for c in captions]

    def name(self, shard: int, sample: Sample) -> str:
        """Shard and key, for messages."""
        return f"{self.urls[shard]}: {sample.key}"

    def _use(self, shard: int, function: Callable[[Path], Any]) -> Any:
        """Call a function with the path of a shard's file, or of its copy, made now if need be."""
        url = self.urls[shard]
        return self.copies.use(url, function) if is_remote(url) else function(Path(url))

    def _opened(self, shard: int) -> "_File":
        return self._use(shard, _File)

    def _grouped(self, shard: int) -> list[Sample]:
        """The samples of a shard; DataError where it cannot be read."""
        index = self.index(shard)
        if index.problems:
            self.problems[self.urls[shard]] = "; ".join(index.problems)
        return self.samples_of(index)

    def samples_of(self, index: tar.TarIndex) -> list[Sample]:
        """The samples among a shard's members."""
        found = (_sample(key, members, self.suffixes) for key, members in grouped(index))
        return [sample for sample in found if sample]


class _File:
    """An open file that closes with its last reference."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def grouped(index: tar.TarIndex) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Key, and place by suffix (in lower case), of what belongs together; of several with one suffix, the first."""
    places = zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)
    named = ((match, place) for name, place in zip(index.names, places, strict=True) if (match := _PARTS.match(name)))
    for key, members in groupby(named, key=lambda member: member[0][1]):
        found: dict[str, tuple[int, int]] = {}
        for match, place in members:
            found.setdefault(match[2].lower(), place)
        yield key, found


_PARTS = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)$", re.DOTALL)


def _sample(key: str, members: dict[str, tuple[int, int]], suffixes: tuple[str, ...]) -> Sample | None:
    media = next((suffix for suffix in suffixes if suffix in members), None)
    caption = next((suffix for suffix in CAPTIONS if suffix in members), None)
    if media is None or caption is None:
        return None
    return Sample(key, members[media], media, members[caption], caption)


def _listed(text: str) -> list:
    content = json.loads(text)
    captions = content.get("captions") if isinstance(content, dict) else None
    return captions if isinstance(captions, list) else []


def are_shards(source: str) -> bool:
    """Whether a data source names tar shards, by its form; a folder by what is in it; all of several."""
    parts = source.split("::")
    return all(any(Path(p).glob("*.tar")) if os.path.isdir(p) else is_remote(p) or p.endswith(".tar") for p in parts)


def expand(source: str) -> list[str]:
    """The shards that a source stands for, in order.

    Raises:
        ValueError: none matches, or a brace list is wrong.
    """
    urls: list[str] = []
    for part in source.split("::"):
        for url in _braces(part):
            if is_remote(url):
                urls.append(url)
                continue
            if os.path.isdir(url):
                url = os.path.join(url, "*.tar")
            found = [url] if os.path.exists(url) or not has_magic(url) else sorted(glob(url))
            if not found:
                raise ValueError(f"no file matches {url}")
            urls += found
    if repeated := len(urls) - len(set(urls)):
        raise ValueError(f"{source} names {repeated} shard(s) twice; a mixture gives a data set more weight")
    return urls


def _braces(text: str) -> list[str]:
    """{000..012} and {a,b} written out; not nested."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [[part] if i % 2 == 0 else _choices(part, text) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inside: str, text: str) -> list[str]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = match.groups()
        if int(first) > int(last):
            raise ValueError(f"{{{inside}}} in {text} counts down; write the smaller number first")
        width = len(first) if first.startswith("0") and len(first) > 1 else 0
        return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    if "," in inside:
        return inside.split(",")
    return [f"{{{inside}}}"]  # a shell's ${VARIABLE}
