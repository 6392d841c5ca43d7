"""Writing files so that a reader finds the old content or the new, never a part."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file in one step."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def as_new(path: Path) -> None:
    """Let whoever may read new files read this one; safetensors lets nobody else read its own."""
    probe = path.with_name(path.name + ".new")
    probe.touch()
    path.chmod(probe.stat().st_mode)
    probe.unlink()


def flush(path: Path) -> None:
    """Until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
