"""The index of weights in several files: *.index.json, as Hugging Face writes it."""

import json
from pathlib import Path, PurePath

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # of files of weights


def read_index(path: Path) -> dict[str, str]:
    """Which file, beside the index, holds a key (its `weight_map`).

    Raises:
        ValueError: it is no such index, or names other than files of weights beside it.
    """
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # Files of the hub are anyone's: an index must not lead to others of this machine.
        strangers = sorted(x for x in set(places.values()) if PurePath(x).name != x or not x.endswith(SUFFIXES))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of weights, {{'weight_map': {{key: file}}}}: {error!r}") from error
    if strangers:
        allowed = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise ValueError(f"{path} names {strangers[0]!r}; an index names files beside it, {allowed}, and no others")
    return places
