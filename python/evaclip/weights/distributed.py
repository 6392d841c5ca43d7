"""Folders of `torch.distributed.checkpoint`, from however many processes: read without running code of theirs."""

import pickle
import warnings
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from evaclip.weights.lazy import Lazy

METADATA = ".metadata"  # what lies where, a pickle
# What it names besides torch.distributed's own records, and dtypes.
HARMLESS = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("pathlib._local", "WindowsPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class _Unpickler(pickle.Unpickler):
    """Makes records alone: a pickle can call whatever it is let name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in HARMLESS or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if module.startswith(("torch.distributed.checkpoint.", "torch.distributed._shard.")):
            found = super().find_class(module, name)
            # A name with dots leads on to all that the module imports.
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"it pickles a {module}.{name}, and no code of a file is run")


class _Reader(dcp.FileSystemReader):
    """Has the list of all shards at hand, which would else be read, and unpickled freely, for each tensor."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *arguments: Any, **named: Any) -> Metadata:
        return self.metadata


def open_distributed(folder: Path) -> dict[str, Lazy]:
    """The tensors of a folder by their keys; where some are named `model.`, these, without that.

    Raises:
        ValueError: files are damaged, cut or missing, or .metadata names what is not known to be harmless.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        stored = {k: m for k, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
        ends = [(place.relative_path, place.offset + place.length) for place in metadata.storage_data.values()]
    except Exception as error:  # of a damaged pickle: any
        raise ValueError(f"cannot read {folder / METADATA}: {error}") from error
    held = {path.name: path.stat().st_size for path in folder.iterdir()}
    broken = sorted({name for name, end in ends if end > held.get(name, 0)})
    if broken:
        raise ValueError(
            f"{folder} lacks files that its {METADATA} names, or ends of them: {', '.join(broken[:5])}; was it copied "
            "whole?"
        )

    def read(name: str) -> Tensor:
        tensor = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant: one process reads
            try:
                dcp.load({name: tensor}, storage_reader=_Reader(folder, metadata), no_dist=True)
            except dcp.CheckpointException as error:  # no Exception
                raise ValueError(f"cannot read {name} of {folder}: a file of it is damaged") from error
        return tensor

    prefix = "model." if any(name.startswith("model.") for name in stored) else ""
    return {
        name.removeprefix(prefix): Lazy(tuple(m.size), m.properties.dtype, partial(read, name))
        for name, m in stored.items()
        if name.startswith(prefix)
    }
