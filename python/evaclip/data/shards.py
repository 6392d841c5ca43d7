"""Data sets in WebDataset shards: tar files whose members `<key>.jpg` and `<key>.txt` are a sample."""

import fcntl
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from glob import glob, has_magic
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaclip.data import tar
from evaclip.data.common import DataError, Recent, some

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff")
VIDEOS = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "gif", "webp")
CAPTIONS = ("captions.json", "txt", "caption")  # the first one counts
COMMANDS = {  # what writes an object to its standard output
    "s3://": "aws s3 cp --only-show-errors {} -",
    "gs://": "gcloud storage cat {}",
    "http://": "curl -fsSL {}",
    "https://": "curl -fsSL {}",
}
ATTEMPTS = 3  # to copy a shard
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
            What cannot be read at random is copied once into the cache, whole, and stays there.
        cache: folder of copies and of indexes that find no place beside their shards.
        video: look for videos instead of images.

    Attributes:
        urls: the shards.
        samples: a function from a shard's number to its list of `Sample`; DataError where it cannot be read.

    Raises:
        ValueError: a file does not exist, or none matches.
    """

    def __init__(self, source: str, *, cache: Path = tar.CACHE, video: bool = False):
        self.source, self.cache, self.video = source, cache, video
        self.suffixes = VIDEOS if video else IMAGES
        self.urls = expand(source)
        missing = [url for url in self.urls if not _remote(url) and not os.path.isfile(url)]
        if missing:
            raise ValueError(f"{len(missing)} of the {len(self.urls)} shards {source} do not exist: {some(missing)}")
        self.samples = Recent(self._grouped, OPEN)
        self._files = Recent(_File, OPEN)

    def __len__(self) -> int:
        return len(self.urls)

    def index(self, shard: int) -> tar.TarIndex:
        """All members of a shard; DataError where it cannot be read."""
        url = self.urls[shard]
        try:
            return tar.index(self.path(shard), self.cache)
        except (OSError, ValueError) as error:
            raise DataError(f"the shard {url} cannot be read: {error}") from error

    def path(self, shard: int) -> Path:
        """A shard's file, copied if it has to be."""
        url = self.urls[shard]
        return copied(url, self.cache) if _remote(url) else Path(url)

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
            found = None if _remote(url) else os.stat(url)
            digest.update(repr((os.path.abspath(url), found and (found.st_size, found.st_mtime_ns))).encode())
        return digest.hexdigest()[:32]

    def read(self, shard: int, sample: Sample) -> tuple[bytes, list[str]]:
        """The image's or video's content, and the captions to choose from.

        Raises:
            OSError, EOFError, ValueError: a member cannot be read.
        """
        file = self._files(str(self.path(shard)))
        text = tar.read(file.descriptor, *sample.caption).decode("utf-8")
        captions = _listed(text) if sample.caption_suffix == "captions.json" else [text]
        if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            raise ValueError("it has no caption, or an empty one")
        return tar.read(file.descriptor, *sample.media), [c.strip() for c in captions]

    def name(self, shard: int, sample: Sample) -> str:
        """Shard and key, for messages."""
        return f"{self.urls[shard]}: {sample.key}"

    def _grouped(self, shard: int) -> list[Sample]:
        """The samples of a shard; DataError where it cannot be read."""
        found = (_sample(key, members, self.suffixes) for key, members in grouped(self.index(shard)))
        return [sample for sample in found if sample]


class _File:
    """An open file that closes with its last reference."""

    def __init__(self, path: str):
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
    """Whether a data source names tar shards, by its form; a folder by what is in it."""
    path = Path(source)
    if path.is_dir():
        return any(path.glob("*.tar"))
    return _remote(source) or source.split("::")[0].endswith(".tar")


def expand(source: str) -> list[str]:
    """The shards that a source stands for, in order.

    Raises:
        ValueError: none matches, or a brace list is wrong.
    """
    urls: list[str] = []
    for part in source.split("::"):
        for url in _braces(part):
            if _remote(url):
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


def _remote(url: str) -> bool:
    return url.startswith(("pipe:", *COMMANDS))


def copied(url: str, cache: Path) -> Path:
    """The copy of a shard in the cache, made now if there is none; several processes wait for one to make it.

    Raises:
        DataError: the command failed several times; the message has its last words.
    """
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = cache / "shards" / f"{digest}.tar"
    if path.exists():
        return path
    scheme = next((scheme for scheme in COMMANDS if url.startswith(scheme)), None)
    command = COMMANDS[scheme].format(_quoted(url)) if scheme else url.removeprefix("pipe:")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for attempt in range(ATTEMPTS):
            if path.exists():
                return path
            time.sleep(attempt)
            words = _run(command, path)
    if words:
        raise DataError(f"`{command}` failed {ATTEMPTS} times; {words}")
    return path


def _run(command: str, path: Path) -> str:
    """Write what a command prints into a file, whole or not at all; returns what went wrong, if anything."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as out:
        done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE)
    if done.returncode == 0 and partial.stat().st_size:
        os.replace(partial, path)
        return ""
    partial.unlink()
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
    return f"exit code {done.returncode}: {last[0]}" if done.returncode else "it wrote nothing"


def _quoted(url: str) -> str:
    return "'" + url.replace("'", "'\\''") + "'"
