"""Weights from one dialect into another, a tensor after the other: memory for one file of the output."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from evaclip.files import as_new, flush
from evaclip.models import create_model
from evaclip.models.clip import CLIP
from evaclip.weights import dialects
from evaclip.weights.files import locate, quoted, run_folder
from evaclip.weights.lazy import Lazy
from evaclip.weights.load import Part, check_option, fitted, read_pieces
from evaclip.weights.resize import Resize

if TYPE_CHECKING:
    from evaclip.train.recipe import Recipe

Dialect = Literal["native", "timm", "open_clip", "hf"]
GB = 10**9
SHARD_SIZE = 5.0  # GB


@dataclass(frozen=True)
class Converted:
    """What was written."""

    files: tuple[Path, ...]  # in order; with several, an index of theirs comes last
    source: str  # the dialect that was read
    to: str
    tensors: int
    parameters: int
    left_out: tuple[str, ...]  # of the source: what is not written

    def __str__(self) -> str:
        left_out = f"; left out: {quoted(self.left_out)}" if self.left_out else ""
        return f"{self.source} to {self.to}: {self.tensors} tensors, {self.parameters:,} parameters{left_out}"


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Dialect = "native",
    model: CLIP | None = None,
    part: Part | None = None,
    resize: Resize | None = None,
    dtype: torch.dtype | None = None,
    shard_size: float = SHARD_SIZE,
) -> Converted:
    """Write weights in another dialect, reading one tensor after the other.

    Args:
        source: a file, folder or name of the hub, as for `load_checkpoint`.
        destination: a .safetensors file, written as several with an index beside them where it would be larger than
            `shard_size`; or a .pt or .bin file, for which all tensors must fit into memory.
        to: the dialect; "timm" has the image tower alone.
        model: what the weights must fit, strictly; it may be on the meta device. Where a run of `evaclip train` is the
            source its own model is taken. Without one, every key must be known, but none is missed.
        part: "visual" or "text": that tower alone.
        resize: "eva" or "timm": interpolate positions and patch kernels to the model's.
        dtype: of floating-point tensors but logit_scale, whose digits half precision would cost; as they are if None.
        shard_size: GB, the largest file.

    Returns:
        what was written.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: the destination is there already.
        ValueError: a source that does not fit, that has tensors for which there is no place in the dialect, or values
            that `dtype` cannot hold.
        OSError: the destination could not be written.
    """
    destination = Path(destination)
    _check_destination(destination, shard_size)
    source = locate(source)
    if model is None and (recipe := recipe_of_run(source)):
        model = model_of(recipe)
    tensors, dialect, left_out = in_dialect(source, to, model=model, part=part, resize=resize)
    if dtype is not None:
        tensors = {key: in_dtype(key, tensor, dtype) for key, tensor in tensors.items()}
    if destination.suffix == ".safetensors":
        files = write_safetensors(tensors, destination, shard_size)
    else:
        with _complete([destination]) as (partial,):
            torch.save({key: owned(tensor) for key, tensor in tensors.items()}, partial)
        files = [destination]
    parameters = sum(tensor.numel for tensor in tensors.values())
    return Converted(tuple(files), dialect, to, len(tensors), parameters, left_out)


def in_dialect(
    source: Path, to: Dialect, *, model: CLIP | None, part: Part | None = None, resize: Resize | None = None
) -> tuple[dict[str, Lazy], str, tuple[str, ...]]:
    """The tensors at a local path in a dialect, not read yet; the dialect of the source; what of it is left out."""
    check_option("to", to, *get_args(Dialect))
    check_option("part", part, *get_args(Part), None)
    if model is not None:
        fit = fitted(source, model, part=part, resize=resize)
        pieces, report = dialects.read(fit.tensors), fit.report
        dialect, left_out = report.dialect, [*report.ignored, *report.unused]
    else:
        if resize is not None:
            raise ValueError("resize needs to know the model whose grid is wanted; name one")
        pieces = dialects.of_part(read_pieces(source, part), part)
        dialect, left_out = pieces.dialect, [*pieces.rotary, *pieces.unused]
        if pieces.unknown:
            raise ValueError(f"{source} ({dialect}) holds keys that are not known: {quoted(list(pieces.unknown))}")
    tensors, homeless = dialects.write(pieces, to)
    if to == "timm":  # the image tower alone
        left_out += [piece for piece in homeless if not piece.startswith("visual.")]
        homeless = [piece for piece in homeless if piece.startswith("visual.")]
    if homeless:
        raise ValueError(f"the dialect {to!r} has no place for {quoted(homeless)} of {source}")
    if not tensors:
        raise ValueError(f"{source} ({dialect}) holds nothing that the dialect {to!r} has a place for")
    return tensors, dialect, tuple(left_out)


def recipe_of_run(source: Path) -> "Recipe | None":
    """The recipe of a run of `evaclip train`, one of its checkpoints, or a file of one."""
    from evaclip.train.recipe import load_recipe  # it stands on this package

    folder = run_folder(source)
    return load_recipe(str(folder / "recipe.json")) if folder else None


def model_of(recipe: "Recipe") -> CLIP:
    """The model of a recipe, on the meta device."""
    model = recipe.model
    return create_model(model.name, device="meta", vision=model.vision, text=model.text)


def write_safetensors(tensors: dict[str, Lazy], path: Path, shard_size: float = SHARD_SIZE) -> list[Path]:
    """Write a file, or several of at most `shard_size` GB and their index, reading the tensors of one at a time.

    Returns:
        the files, the index last.
    """
    shards: list[list[str]] = [[]]
    room = limit = shard_size * GB
    for key, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(key)
        room -= tensor.nbytes
    paths = [path]
    if len(shards) > 1:
        names = [f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        paths = [*(path.with_name(name) for name in names), index_of(path)]
    with _complete(paths) as partials:
        for keys, partial in zip(shards, partials, strict=False):
            save_file({key: owned(tensors[key]) for key in keys}, partial, metadata={"format": "pt"})
        if len(shards) > 1:
            places = {key: file.name for keys, file in zip(shards, paths, strict=False) for key in keys}
            total = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": places}
            partials[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def index_of(path: Path) -> Path:
    """The index that stands for a file written as several."""
    return path.with_name(path.name + ".index.json")


def in_dtype(key: str, tensor: Lazy, dtype: torch.dtype) -> Lazy:
    """A weight in another dtype; reading it raises ValueError where that cannot hold a value."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; give one of floating point")
    if not tensor.dtype.is_floating_point or key == "logit_scale" or tensor.dtype == dtype:
        return tensor

    def read() -> Tensor:
        values = tensor.read()
        rounded = values.to(dtype)
        if not torch.equal(rounded.isfinite(), values.isfinite()):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"{key} has values that {name} cannot hold; take bfloat16, or leave them as they are")
        return rounded

    return Lazy(tensor.shape, dtype, read)


def owned(tensor: Lazy) -> Tensor:
    """A tensor in memory of its own: what is read may be a part of a mapped file, or have strides."""
    return tensor.read().clone(memory_format=torch.contiguous_format)


def _check_destination(destination: Path, shard_size: float) -> None:
    if destination.suffix not in (".safetensors", ".pt", ".bin"):
        raise ValueError(f"{destination} is to be written; its name must end in .safetensors, .pt or .bin")
    if not shard_size > 0:
        raise ValueError(f"shard_size is {shard_size} GB; above 0")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {destination.parent} for {destination.name}")
    _check_free([destination, index_of(destination)])


def _check_free(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} is there already; nothing is overwritten, so give another name")


@contextmanager
def _complete(paths: list[Path]) -> Iterator[list[Path]]:
    """Names to write files under, in a folder beside; they get their own when all are complete, else they go."""
    _check_free(paths)
    with tempfile.TemporaryDirectory(dir=paths[0].parent, prefix=paths[0].name + ".") as folder:
        partials = [Path(folder) / path.name for path in paths]
        try:
            yield partials
            for partial in partials:
                as_new(partial)
                flush(partial)
        except (RuntimeError, SafetensorError) as error:  # of torch.save and safetensors
            raise OSError(
                f"{paths[-1]} could not be written, and nothing of it is left; is the disk full? ({error})"
            ) from error
        _check_free(paths)  # still: writing takes its time
        for path, partial in zip(paths, partials, strict=True):
            os.replace(partial, path)
