"""Opening weights: any file or folder that holds some, as a dictionary of tensors that are not read yet."""

import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from evaclip.data.common import Recent
from evaclip.weights import hub, zero
from evaclip.weights.distributed import METADATA, open_distributed
from evaclip.weights.index import SUFFIXES, read_index
from evaclip.weights.lazy import Lazy

WRAPPERS = ("state_dict", "model", "module")  # keys that training scripts put the weights under
ReadFile = Callable[[Path], dict[str, Tensor]]
SHOWN = 5  # names quoted of a longer list
# In a folder, the first of these that is there.
NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
# Classes of objects that training scripts pickle beside the weights. They are not imported: `Opaque` stands for them.
OPAQUE = (
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class UnreadableError(ValueError):
    """A file of weights that is truncated, damaged, or holds other things than tensors; the message names it."""


class Opaque:
    """In place of an object that nobody reads; takes whatever it is given and keeps none of it."""

    def __init__(self, *arguments: Any, **named: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def locate(source: str | Path) -> Path:
    """The local path of weights: that path, or files of the Hugging Face hub, downloaded.

    Raises:
        FileNotFoundError: nothing there, neither here nor on the hub.
    """
    if Path(source).exists():
        return Path(source)
    name = hub.repository(str(source), SUFFIXES)
    if name is None:
        raise FileNotFoundError(f"no checkpoint at {source}")
    return hub.download(*name, NAMES, SUFFIXES)


def open_weights(path: Path, read_file: ReadFile | None = None) -> dict[str, Lazy]:
    """The tensors of a file or folder by their keys, wrappers and a leading `module.` taken off; none is read yet.

    Args:
        path: .safetensors, .pt, .pth or .bin; an index (.index.json) of several; or a folder: of such files, of a
            run of `evaclip train` or one of its checkpoints, of `torch.distributed.checkpoint`, or of DeepSpeed.
        read_file: what reads files of torch.save, where several are opened together.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a file cannot be read, holds other things than tensors, or parts are missing.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".json":
        return _open_index(path)
    if path.suffix == ".safetensors":
        return without_module(_open_safetensors(path))
    # One file of several is mapped at a time, so that pages of the others may leave memory.
    read = read_file or Recent(_read_file, 1)

    def of_file(key: str) -> Tensor:
        return read(path)[key]

    return {k: Lazy(tuple(x.shape), x.dtype, partial(of_file, k)) for k, x in read(path).items()}


def run_folder(path: Path) -> Path | None:
    """The folder whose recipe.json tells what a path holds, where `evaclip train` wrote it."""
    return next((folder for folder in (path, path.parent) if (folder / "recipe.json").is_file()), None)


def some(names: Sequence[str]) -> str:
    """The first of several names."""
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")


def quoted(names: Sequence[str]) -> str:
    """The first of several names, in quotes."""
    return some([repr(name) for name in names])


def _open_folder(folder: Path) -> dict[str, Lazy]:
    if (folder / "checkpoints").is_dir() and (folder / "recipe.json").is_file():
        from evaclip.train.checkpoint import latest  # it stands on this package

        return _open_folder(latest(folder))
    if (folder / "shards" / METADATA).is_file():
        folder = folder / "shards"
    if (folder / METADATA).is_file():
        return without_module(open_distributed(folder))
    if (shards := zero.folder_of(folder)) is not None:
        return without_module(zero.open_zero(shards, load_plain))
    for name in NAMES:
        if (folder / name).is_file():
            return open_weights(folder / name)
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES or p.name.endswith(".index.json"))
    indexes = [p for p in found if p.suffix == ".json"]
    chosen = indexes or found
    if len(chosen) != 1:
        held = quoted([p.name for p in chosen]) if chosen else f"none of *{', *'.join(SUFFIXES)}"
        raise FileNotFoundError(f"which weights of the folder {folder}? It holds {held}; give one file")
    return open_weights(chosen[0])


def _open_index(path: Path) -> dict[str, Lazy]:
    """The tensors of all files that an index names."""
    places = read_index(path)
    files = {name: path.parent / name for name in sorted(set(places.values()))}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} names files that are not beside it: {quoted(missing)}")
    read_file = Recent(_read_file, 1)
    opened = {name: open_weights(file, read_file) for name, file in files.items()}
    places = without_module(places)
    absent = [f"{key} in {name}" for key, name in places.items() if key not in opened[name]]
    if absent:
        raise ValueError(f"{path} names tensors that its files do not hold: {quoted(absent)}")
    return {key: opened[name][key] for key, name in places.items()}


def _open_safetensors(path: Path) -> dict[str, Lazy]:
    try:
        with safe_open(path, "pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
            # A slice of no rows tells the dtype; a scalar has no rows, and costs nothing.
            shapes = {key: tuple(part.get_shape()) for key, part in parts.items()}
            dtypes = {key: (part[:0] if shapes[key] else file.get_tensor(key)).dtype for key, part in parts.items()}
    except Exception as error:  # of the file's own kinds
        raise UnreadableError(f"cannot read {path}: truncated, damaged or not a file of tensors ({error})") from error

    def read(key: str) -> Tensor:
        with safe_open(path, "pt") as file:  # opened anew, so that pages already read may leave memory
            return file.get_tensor(key)

    return {key: Lazy(shape, dtypes[key], partial(read, key)) for key, shape in shapes.items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    return unwrap(load_plain(path), path)


def load_plain(path: Path) -> Any:
    """What torch.save wrote, tensors mapped and not read; no code of the file runs.

    Raises:
        ValueError: the file is damaged, or holds objects of a class that is not known to be harmless (it is named).
    """
    zipped = zipfile.is_zipfile(path)  # files since torch 1.6: their tensors need not be read before they are copied
    try:
        if zipped and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise ValueError(
                "it is a TorchScript archive, as OpenAI's; if you trust it, save its weights alone: "
                "torch.save(torch.jit.load(path, 'cpu').state_dict(), 'weights.pt')"
            )
        with torch.serialization.safe_globals([(Opaque, name) for name in OPAQUE]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # each reader has its own exceptions for a damaged file
        reason = str(error).strip() or type(error).__name__
        if named := re.search(r"GLOBAL (\S+)", reason):
            reason = (
                f"it pickles a {named[1]}, and no code of a file is run; if you trust it, save its weights alone: "
                "torch.save(torch.load(path, weights_only=False)['...'], 'weights.pt')"
            )
        raise UnreadableError(
            f"cannot read {path}: truncated, damaged or not a file of tensors alone ({reason})"
        ) from error


def unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by key of what a file holds, wrappers and a leading `module.` taken off."""
    wrapper = _wrapper(content)
    while wrapper is not None:
        content, wrapper = wrapper, _wrapper(wrapper)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds {type(content).__name__}, not a dictionary of tensors by name")
    strangers = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strangers:
        raise ValueError(
            f"{path} holds entries that are no tensors by name: {quoted(strangers)}; weights may lie under one of"
            f" {', '.join(WRAPPERS)}"
        )
    return without_module(content)


def without_module(by_key: dict) -> dict:
    """The same with a leading `module.` taken off, where all keys have one."""
    while by_key and all(key.startswith("module.") for key in by_key):
        by_key = {key.removeprefix("module."): value for key, value in by_key.items()}
    return by_key


def _wrapper(content: Any) -> dict | None:
    inner = (content.get(key) for key in WRAPPERS) if isinstance(content, dict) else ()
    return next((value for value in inner if isinstance(value, dict)), None)
