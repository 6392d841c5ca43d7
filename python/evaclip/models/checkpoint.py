"""Reading published weights into a model: all of them, or none and a list of what does not fit."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "module")  # keys that training scripts put the weights under
SHOWN = 5  # keys quoted from a file of an unknown dialect


@dataclass(frozen=True)
class LoadReport:
    """What was read."""

    path: Path
    tensors: int  # read into the model
    parameters: int  # the elements of these
    dtypes: tuple[str, ...]  # of the tensors in the file; the model keeps its own
    ignored: tuple[str, ...]  # keys of rotary tables, which the model computes

    def __str__(self) -> str:
        ignored = f"; {len(self.ignored)} rotary tables ignored" if self.ignored else ""
        dtypes = ", ".join(self.dtypes)
        return f"{self.path}: {self.tensors} tensors of {dtypes}, {self.parameters:,} parameters{ignored}"


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Read a checkpoint with native keys into a model; strict, and nothing is changed unless everything fits.

    Args:
        model: from `create_model`, on a real device.
        path: a .safetensors, .pt or .bin file. Wrappers (`state_dict`, `model`, `module`) and a leading `module.` of
            the keys are taken off; rotary tables are ignored. Tensors are converted to the dtype of the parameter.

    Returns:
        what was read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or its keys are of another dialect, or a key is missing, unexpected or of
            another shape: all of them are listed.
    """
    path = Path(path)
    weights = _unwrap(_read(path), path)
    ignored = tuple(key for key in weights if _is_rotary_table(key))
    weights = {key: tensor for key, tensor in weights.items() if not _is_rotary_table(key)}
    target = model.state_dict(keep_vars=True)
    on_meta = [key for key, tensor in target.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(f"a model on the meta device cannot hold {path}; call model.to_empty(device=...) first")
    _check_fit(weights, target, path)
    with torch.no_grad():
        for key, tensor in target.items():
            tensor.copy_(weights[key])
    return LoadReport(
        path,
        tensors=len(weights),
        parameters=sum(tensor.numel() for tensor in weights.values()),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})),
        ignored=ignored,
    )


def _read(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Files since torch 1.6 are zip archives, whose tensors need not be read before they are copied.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # each reader has its own exceptions for a damaged file
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"cannot read {path}: truncated, damaged or not a file of tensors alone ({reason})") from error


def _unwrap(weights: object, path: Path) -> dict[str, Tensor]:
    wrapper = _wrapper(weights)
    while wrapper is not None:
        weights, wrapper = wrapper, _wrapper(wrapper)
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} holds {type(weights).__name__}, not a dictionary of tensors by name")
    strangers = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ValueError(
            f"{path} holds entries that are no tensors: {_quoted(strangers)}; weights may lie under one of"
            f" {', '.join(WRAPPERS)}"
        )
    while all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): tensor for key, tensor in weights.items()}
    return weights


def _wrapper(weights: object) -> dict | None:
    inner = (weights.get(key) for key in WRAPPERS) if isinstance(weights, dict) else ()
    return next((value for value in inner if isinstance(value, dict)), None)


def _is_rotary_table(key: str) -> bool:
    return ".rope." in key or key.endswith(("freqs_cos", "freqs_sin"))


def _check_fit(weights: dict[str, Tensor], target: dict[str, Tensor], path: Path) -> None:
    common = weights.keys() & target.keys()
    if not common:
        raise ValueError(
            f"{path} is written in another dialect: its {len(weights)} keys look like {_quoted(list(weights))};"
            f" those of the model look like {_quoted(list(target))}"
        )
    misfits = [f"missing: {key} {tuple(target[key].shape)}" for key in target if key not in weights]
    misfits += [f"unexpected: {key} {tuple(weights[key].shape)}" for key in weights if key not in target]
    misfits += [
        f"reshaped: {key} is {tuple(weights[key].shape)}, the model's {tuple(target[key].shape)}"
        for key in target
        if key in common and weights[key].shape != target[key].shape
    ]
    if misfits:
        raise ValueError(f"{path} does not fit the model, which is unchanged:\n  " + "\n  ".join(misfits))


def _quoted(keys: list[str]) -> str:
    dots = ", ..." if len(keys) > SHOWN else ""
    return ", ".join(repr(key) for key in keys[:SHOWN]) + dots
