"""Tar files read at random: an index of members from their headers alone, kept for the next time."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

BLOCK = 512
VERSION = 1  # of the index's file
CACHE = Path("~/.cache/evaclip").expanduser()


class TarIndex(NamedTuple):
    """The files in a tar, in its order."""

    names: list[str]
    offsets: np.ndarray  # (members,) int64, in bytes: where the content begins
    sizes: np.ndarray  # (members,) int64, in bytes
    problems: list[str]  # what is wrong with the tar, in sentences; members that are not whole are left out


def scan(path: str | os.PathLike) -> TarIndex:
    """The index of a tar (ustar, GNU, pax), from its headers; contents are not read.

    Raises:
        ValueError: the file is compressed, or no tar at all.
        OSError: it cannot be read.
    """
    names: list[str] = []
    places: list[tuple[int, int]] = []
    problems: list[str] = []
    file = os.open(path, os.O_RDONLY)
    try:
        length = os.fstat(file).st_size
        first = os.pread(file, BLOCK, 0)
        for magic, kind in _COMPRESSED.items():
            if first.startswith(magic):
                raise ValueError(f"{path} is {kind}; only a plain .tar can be read at random, so unpack it")
        if length and not _is_header(first) and first.strip(b"\0"):
            raise ValueError(f"{path} is no tar: it does not begin with a header")
        for name, offset, size in _members(file, length, problems):
            names.append(name)
            places.append((offset, size))
    finally:
        os.close(file)
    offsets, sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return TarIndex(names, offsets, sizes, problems)


_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _members(file: int, length: int, problems: list[str]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular file."""
    position, long_name = 0, None
    pax: dict[str, str] = {}
    while True:
        header = os.pread(file, BLOCK, position)
        if len(header) < BLOCK:
            problems.append(f"it ends at byte {length} without an end mark")
            return
        if not header.strip(b"\0"):
            return
        if not _is_header(header):
            problems.append(f"there is no header at byte {position}; what follows is not read")
            return
        kind, size = header[156:157], int(pax.get("size", _number(header[124:136])))
        name = pax.get("path") or long_name or _name(header)
        offset = position + BLOCK
        if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):  # links, devices, folders and pipes have no content
            size = 0
        elif offset + size > length:
            problems.append(f"{name} is cut short: it has {length - offset} of {size} bytes")
            return
        position = offset + -(-size // BLOCK) * BLOCK
        if kind == b"L":  # GNU: the name of the next member
            long_name = _text(os.pread(file, size, offset).split(b"\0", 1)[0])
        elif kind == b"x":  # pax: fields of the next member
            pax = _pax(os.pread(file, size, offset))
        elif kind in (b"K", b"g"):  # names of links, and fields for all members: none that matter here
            pass
        else:
            if kind in (b"0", b"\0", b"7"):
                yield name, offset, size
            elif kind == b"S":
                problems.append(f"{name} is a sparse file, which cannot be read; pack it anew")
                return
            long_name, pax = None, {}


def _is_header(block: bytes) -> bool:
    """Whether the checksum is right; some old tars sum signed bytes."""
    try:
        expected = _number(block[148:156])
    except ValueError:
        return False
    blank = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(blank)
    return expected in (unsigned, unsigned - 256 * sum(byte > 127 for byte in blank))


def _number(field: bytes) -> int:
    if field[:1] in (b"\x80", b"\xff"):  # GNU: base 256 where octal digits do not suffice
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:  # GNU keeps other things there
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Records of the form "<length> <key>=<value>\\n"."""
    fields, position = {}, 0
    while match := re.compile(rb"(\d+) ([^=]+)=").match(data, position):
        end = position + int(match[1])
        fields[_text(match[2])] = _text(data[match.end() : end - 1])
        position = max(end, match.end())
    return fields


def index(path: Path, cache: Path = CACHE) -> TarIndex:
    """The index of a tar as kept beside it or in `cache`, where that fits the tar's size and time; else by `scan`.

    A new index is written beside the tar, or into `cache` where that folder is not writable.
    """
    found = path.stat()
    stamp = np.array([VERSION, found.st_size, found.st_mtime_ns])
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    files = path.with_name(path.name + ".index"), cache / "indexes" / f"{path.name}-{digest}.index"
    for file in files:
        with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(file, allow_pickle=False) as kept:
            if np.array_equal(kept["stamp"], stamp):
                return TarIndex(_lines(kept["names"]), kept["offsets"], kept["sizes"], _lines(kept["problems"]))
    new = scan(path)
    for file in files:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, new, stamp)
            break
    return new


def _write(file: Path, new: TarIndex, stamp: np.ndarray) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")  # several processes may write the same index
    try:
        with partial.open("wb") as out:
            names, problems = _bytes(new.names), _bytes(new.problems)
            np.savez(out, stamp=stamp, names=names, offsets=new.offsets, sizes=new.sizes, problems=problems)
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _bytes(lines: list[str]) -> np.ndarray:
    return np.frombuffer(b"".join(line.encode("utf-8", "surrogateescape") + b"\0" for line in lines), dtype=np.uint8)


def _lines(data: np.ndarray) -> list[str]:
    return [_text(line) for line in data.tobytes().split(b"\0")[:-1]]


def read(file: int, offset: int, size: int) -> bytes:
    """Bytes of an open file.

    Raises:
        EOFError: the file ends before.
    """
    parts = []
    while size:
        part = os.pread(file, size, offset)
        if not part:
            raise EOFError(f"the file ends {size} bytes too early")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]
