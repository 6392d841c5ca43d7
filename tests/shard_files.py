"""Shards of small pictures whose captions are their numbers, for tests."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from evaclip.data import WordTokenizer, image_transform
from evaclip.data.mixture import Mixture
from evaclip.data.shards import Shards

NUMBERS = WordTokenizer([str(i) for i in range(200)], context=3)
BROKEN = b"\xff\xd8 broken"


def jpeg(number: int, size: tuple[int, int] = (12, 10)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG")
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as out:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: list[int], first: int = 0, broken=()) -> str:
    """Shards 000.tar ... of so many samples each, numbered through; returns their pattern."""
    for shard, count in enumerate(counts):
        members = {}
        for number in range(first, first + count):
            members[f"{number:04}.jpg"] = BROKEN if number in broken else jpeg(number)
            members[f"{number:04}.txt"] = str(number).encode()
        write_tar(folder / f"{shard:03}.tar", members)
        first += count
    return str(folder / f"{{000..{len(counts) - 1:03}}}.tar")


def mixture(*sources: str, cache: Path, batch_size: int = 6, **options) -> Mixture:
    transform = image_transform(8, mode="train")
    options = {"seed": 0, "transform": transform, "tokenizer": NUMBERS} | options
    return Mixture(
        [Shards(source, cache=cache, video=options.get("frames", 0) > 0) for source in sources], batch_size, **options
    )


def numbers(ids) -> list[int]:
    """What a batch's captions say."""
    return [int(NUMBERS.words[i - 2]) for i in ids[:, 1].tolist()]
