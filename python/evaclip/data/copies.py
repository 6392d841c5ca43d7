"""Copies of shards from elsewhere, which cannot be read at random where they are."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from evaclip.data.common import DataError

COMMANDS = {  # what writes an object to its standard output
    "s3://": "aws s3 cp --only-show-errors {} -",
    "gs://": "gcloud storage cat {}",
    "http://": "curl -fsSL {}",
    "https://": "curl -fsSL {}",
}
ATTEMPTS = 3  # to copy a shard


def is_remote(url: str) -> bool:
    """Whether a shard is an address or a command's output, rather than a file."""
    return url.startswith(("pipe:", *COMMANDS))


class Copies:
    """Whole copies of remote shards in a folder that processes share.

    Args:
        room: bytes that copies may take beside those that are being made; for a new one those used longest ago are
            removed. 0: all stay. What is read at the same time should fit, or it is copied again and again.
    """

    def __init__(self, folder: Path, room: int = 0):
        self.folder, self.room = folder, room

    def use(self, url: str, function: Callable[[Path], Any]) -> Any:
        """Call a function with the path of a shard's copy, made now if there is none.

        A file that it opens stays readable when the copy is removed.

        Raises:
            DataError: the command failed several times; the message has its last words.
        """
        for _ in range(ATTEMPTS):
            path = self._copied(url)
            try:
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # now used; as old as it was
                return function(path)
            except FileNotFoundError as error:  # removed to make room, before it was open
                removed = error
        raise removed

    def _copied(self, url: str) -> Path:
        path = self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
        if path.exists():
            return path
        scheme = next((scheme for scheme in COMMANDS if url.startswith(scheme)), None)
        command = COMMANDS[scheme].format(_quoted(url)) if scheme else url.removeprefix("pipe:")
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):  # several processes wait for one to make it
            if not path.exists():
                _make(command, path)
        if self.room:
            self._make_room(path)
        return path

    def _make_room(self, new: Path) -> None:
        with _locked(self.folder / "room.lock"):
            found = sorted((stat.st_atime_ns, stat.st_size, path) for path, stat in _stats(self.folder))
            excess = sum(size for _, size, _ in found) - self.room
            for _, size, path in found:
                if excess > 0 and path != new:
                    path.unlink(missing_ok=True)
                    path.with_name(path.name + ".index").unlink(missing_ok=True)
                    excess -= size


def _stats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            yield path, path.stat()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(command: str, path: Path) -> None:
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        words = _run(command, path)
        if not words:
            return
    raise DataError(f"`{command}` failed {ATTEMPTS} times; {words}")


def _run(command: str, path: Path) -> str:
    """Write what a command prints into a file, whole or not at all; returns what went wrong, if anything."""
    partial = path.with_suffix(".partial")
    # Of a pipeline no part may fail, or half an archive would pass for a whole one; a plain sh cannot tell.
    bash = shutil.which("bash")
    words = [bash, "-o", "pipefail", "-c", command] if bash else ["sh", "-c", command]
    with partial.open("wb") as out:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE)
    if done.returncode == 0 and partial.stat().st_size:
        os.replace(partial, path)
        return ""
    partial.unlink()
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
    return f"exit code {done.returncode}: {last[0]}" if done.returncode else "it wrote nothing"


def _quoted(url: str) -> str:
    return "'" + url.replace("'", "'\\''") + "'"
