"""Weights of the Hugging Face hub, downloaded into its cache by huggingface_hub."""

import re
from pathlib import Path, PurePosixPath

from evaclip.data.common import extra
from evaclip.weights.index import read_index

PREFIX = "hf-hub:"


def repository(source: str, suffixes: tuple[str, ...]) -> tuple[str, str | None] | None:
    """(owner/name, file or None) where a source names these of the hub: hf-hub:owner/name[/file], or owner/name."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", source.removeprefix(PREFIX))
    if match is None:
        return None
    if not source.startswith(PREFIX) and (match[2] or Path(source).suffix in suffixes or Path(source).parent.is_dir()):
        return None  # a path at which nothing lies
    return match[1], match[2]


def download(name: str, file: str | None, names: tuple[str, ...], suffixes: tuple[str, ...]) -> Path:
    """A repository's weights, or one file of it, from the hub or its cache.

    Args:
        name: owner/name.
        file: in the repository; None: the first of `names`, or the only file with one of the suffixes.

    Raises:
        FileNotFoundError: the hub cannot be reached or has no such repository or file, or it is not clear which.
        ImportError: huggingface_hub is not installed.
    """
    hub = extra("huggingface_hub", "huggingface_hub", f"{name}, which is no local path but a name of the hub,", "hub")
    try:
        files = [file] if file else hub.list_repo_files(name)
        chosen = file or _choose(name, files, names, suffixes)
        path = Path(hub.hf_hub_download(name, chosen))
        if path.name.endswith(".index.json"):
            for part in sorted(set(read_index(path).values())):
                hub.hf_hub_download(name, str(PurePosixPath(chosen).parent / part))
        return path
    except Unclear:
        raise
    except Exception as error:  # of the hub, and of several HTTP libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"there is no path {name} here, and the Hugging Face hub did not give {name} ({reason}); download it where "
            "there is a network, and give the file or folder"
        ) from error


class Unclear(FileNotFoundError):
    """A repository whose files do not tell which of them is meant."""


def _choose(name: str, files: list[str], names: tuple[str, ...], suffixes: tuple[str, ...]) -> str:
    for known in names:
        if known in files:
            return known
    found = [file for file in files if file.endswith(suffixes)]
    if len(found) == 1:
        return found[0]
    held = ", ".join(found) or "no file of weights"
    raise Unclear(f"which weights of {name}? It holds {held}; give one as {PREFIX}{name}/FILE")
