"""DeepSpeed's checkpoints: float32 weights put together from the shards of ZeRO's optimizer, without DeepSpeed.

Stages 1 and 2 (of fp16, and of bf16): each process has, per parameter group, an equal part of the group's parameters
laid end to end. Stage 3: each process has an equal part of each parameter, these laid end to end; the last is padded.
Source: the layout that DeepSpeed's zero_to_fp32.py reads.
"""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaclip.weights.lazy import Lazy, lazy

OPTIMIZER, MODEL = "*_optim_states.pt", "*_model_states.pt"


def folder_of(path: Path) -> Path | None:
    """The folder of DeepSpeed's files: this, or the one that its file `latest` names; None: it is not DeepSpeed's."""
    if any(path.glob(MODEL)):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    named = path / latest.read_text(encoding="utf-8").strip()
    if not any(named.glob(MODEL)):
        raise FileNotFoundError(f"{latest} names {named}, which holds no {MODEL}")
    return named


def open_zero(folder: Path, load: Callable[[Path], Any]) -> dict[str, Lazy]:
    """The weights of a checkpoint: float32 ones of the optimizer where it holds them, frozen ones and buffers.

    Args:
        folder: as of `folder_of`.
        load: reads a file of torch.save, with tensors mapped.

    Raises:
        ValueError: files are missing, do not belong together, or are of tensor-parallel models.
    """
    models = _by_rank(folder, MODEL)
    if any(path.name.split("mp_rank_")[1][:2] != "00" for path in models):
        raise ValueError(f"{folder} is of a tensor-parallel model; join its parts with DeepSpeed's ds_to_universal.py")
    states = [_dictionary(path, load) for path in models]
    first = states[0]
    tensors = first.get("module") or {}
    optimizers = _by_rank(folder, OPTIMIZER)
    if not optimizers:  # without ZeRO, the weights are the model's own
        return {key: lazy(tensor) for key, tensor in tensors.items()}
    shards = [_dictionary(path, load).get("optimizer_state_dict", {}) for path in optimizers]
    _check_count(folder, shards)
    # A list of groups; each: name -> shape, in the order of the flat tensors.
    groups = [{name: tuple(shape) for name, shape in group.items()} for group in _listed(first.get("param_shapes"))]
    frozen = first.get("frozen_param_shapes") or {}
    found = {key: lazy(tensors[key].float()) for key in first.get("buffer_names") or () if key in tensors}
    if all("single_partition_of_fp32_groups" in shard for shard in shards):
        counts = [len(shard["single_partition_of_fp32_groups"]) for shard in shards]
        if set(counts) != {len(groups)}:
            raise ValueError(f"{folder}: the model has {len(groups)} groups of parameters, the shards {counts}")
        found |= {name: lazy(first["frozen_param_fragments"][name]) for name in frozen}
        for number, shapes in enumerate(groups):
            parts = [shard["single_partition_of_fp32_groups"][number] for shard in shards]
            found |= _laid_end_to_end(folder, shapes, parts)
    elif all("fp32_flat_groups" in shard for shard in shards):
        for name, shape in frozen.items():
            fragments = [state["frozen_param_fragments"][name].flatten() for state in states]
            found[name] = _joined(tuple(shape), fragments[0].dtype, [(fragments, 0, math.prod(shape))])
        shapes = {name: shape for group in groups for name, shape in group.items()}
        found |= _cut_each(folder, shapes, [list(_listed(shard["fp32_flat_groups"])) for shard in shards])
    else:
        raise ValueError(
            f"{folder} holds optimizer states of a kind that is not known here; run the zero_to_fp32.py that DeepSpeed "
            "puts beside them, and give the file it writes"
        )
    for alias, name in dict(first.get("shared_params") or {}).items():
        if name in found:
            found[alias] = found[name]
    return found


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda path: [int(n) for n in re.findall(r"rank_(\d+)", path.name)])


def _dictionary(path: Path, load: Callable[[Path], Any]) -> dict:
    content = load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no file of DeepSpeed's: it holds a {type(content).__name__}")
    return content


def _listed(groups: Any) -> Iterable:
    return groups if isinstance(groups, list | tuple) else [groups or {}]


def _check_count(folder: Path, shards: list[dict]) -> None:
    counts = {max(_listed(shard.get("partition_count", len(shards)))) for shard in shards}
    if counts != {len(shards)}:
        raise ValueError(
            f"{folder} holds {len(shards)} files {OPTIMIZER}, of a run of {max(counts)} processes; all are needed"
        )


def _laid_end_to_end(folder: Path, shapes: dict, parts: list[Tensor]) -> dict[str, Lazy]:
    """Stages 1 and 2: the parameters of a group, one after the other in the parts together."""
    needed, held = sum(math.prod(shape) for shape in shapes.values()), sum(part.numel() for part in parts)
    slack = 2 * len(parts)  # DeepSpeed pads a group to a multiple of this, or takes the padding off
    if not needed <= held < needed + slack:
        raise ValueError(
            f"{folder}: a group of {needed} elements, but its shards hold {held}; a file is cut or foreign"
        )
    found, offset = {}, 0
    for name, shape in shapes.items():
        found[name] = _joined(shape, parts[0].dtype, [(parts, offset, math.prod(shape))])
        offset += math.prod(shape)
    return found


def _cut_each(folder: Path, shapes: dict, ranks: list[list[Tensor]]) -> dict[str, Lazy]:
    """Stage 3: of each parameter an equal part in each process."""
    needed = sum(math.ceil(math.prod(shape) / len(ranks)) for shape in shapes.values())
    for rank, parts in enumerate(ranks):
        if (held := sum(part.numel() for part in parts)) < needed:
            raise ValueError(f"{folder}: process {rank} holds {held} elements, its parameters have {needed}")
    found, offset = {}, 0
    for name, shape in shapes.items():
        each = math.ceil(math.prod(shape) / len(ranks))
        found[name] = _joined(shape, ranks[0][0].dtype, [(parts, offset, each) for parts in ranks])
        offset += each
    return found


def _joined(shape: tuple[int, ...], dtype: torch.dtype, places: list[tuple[list[Tensor], int, int]]) -> Lazy:
    """A tensor from places, each (flat tensors that follow one another, first element, count); padding is cut off."""

    def read() -> Tensor:
        pieces = []
        for parts, start, count in places:
            for part in parts:
                if count and start < part.numel():
                    taken = part[start : start + count]
                    pieces.append(taken)
                    count -= taken.numel()
                    start = 0
                else:
                    start = max(0, start - part.numel())
        return torch.cat(pieces)[: math.prod(shape)].view(shape)

    return Lazy(shape, dtype, read)
