"""Where DTensors lie, and the order of work that follows on each rank."""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

BATCH = 1 << 22  # elements whose moments are computed together: what bounds the memory of temporaries

Set = tuple[int, ...]  # process groups, by number


class Place(NamedTuple):
    """Where a tensor lies: all that the order of work depends on."""

    shape: torch.Size
    numel: int  # of this rank's part
    mesh: DeviceMesh | None  # None: a plain tensor, the same on every rank
    placements: tuple


class Plan(NamedTuple):
    """The order of work on this rank."""

    groups: list[tuple[int, int]]  # a process group each: a tensor, and a dimension of its mesh
    pieces: list[list[int]]  # how each tensor's part is cut at the borders of trust ratios
    first: list[Tensor]  # for each process group: which numbers of the first buffer it adds up
    second: list[Tensor]  # of the second
    by_cell: Tensor  # the adapted pieces in the order of their cells
    cells: Tensor  # how many pieces each cell has
    ratios: Tensor  # how many cells each ratio has
    by_set: Tensor  # the parts of gradients in the order of their sets
    sets: Tensor  # how many each set has
    adapted: list[int]  # tensors with a trust ratio
    group_of_tensor: Tensor  # of parameters, as the caller has them
    group_of_ratio: Tensor
    tensor_of_piece: Tensor
    ratio_of_piece: Tensor  # one past the last: none
    batches: list[list[int]]


def refusal(param: Tensor) -> str | None:
    """Why a parameter cannot be stepped, in a sentence."""
    if isinstance(param, DTensor) and any(p.is_partial() for p in param.placements):
        return (
            f"FusedLAMB: a parameter has placements {param.placements}; allowed are Shard and Replicate, so add up "
            "its partial sums with redistribute()"
        )
    return None


def placed(param: Tensor, value: Tensor) -> Tensor:
    """A tensor that every rank has whole, or shards of any kind, in the placement of a parameter."""
    if not isinstance(param, DTensor):
        return value.full_tensor() if isinstance(value, DTensor) else value
    if not isinstance(value, DTensor):
        return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    if value.device_mesh != param.device_mesh:
        raise ValueError(
            f"FusedLAMB: a loaded state lies on {value.device_mesh}, its parameter on {param.device_mesh}; load "
            "checkpoints of another mesh with torch.distributed.checkpoint"
        )
    return value if value.placements == param.placements else value.redistribute(placements=param.placements)


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter, in the parameter's placement."""
    grad = param.grad
    assert grad is not None
    if not isinstance(param, DTensor) and not isinstance(grad, DTensor):
        return grad
    if not (isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.device_mesh == param.device_mesh):
        lie = (f"on {x.device_mesh}" if isinstance(x, DTensor) else "no DTensor" for x in (param, grad))
        raise RuntimeError("FusedLAMB: a parameter is {}, its gradient is {}; give both the same mesh".format(*lie))
    return grad if grad.placements == param.placements else grad.redistribute(placements=param.placements)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def place_of(whole: Tensor, part: Tensor) -> Place:
    if isinstance(whole, DTensor):
        return Place(whole.shape, part.numel(), whole.device_mesh, whole.placements)
    return Place(whole.shape, part.numel(), None, ())


@functools.lru_cache(maxsize=16)
def plan(
    places: tuple[Place, ...],
    sizes: tuple[int, ...],
    adapts: tuple[bool, ...],
    slices: int,
    limited: bool,
    scaled: bool,
    device: torch.device,
    rank: int,
) -> Plan:
    groups: dict[tuple[int, ...], tuple[int, int]] = {}  # by ranks
    spread: list[Set] = []  # over which groups each tensor is
    for i, place in enumerate(places):
        over = []
        for dim, placement in enumerate(place.placements):
            assert place.mesh is not None
            if place.mesh.size(dim) > 1 and not isinstance(placement, Replicate):
                ranks = tuple(dist.get_process_group_ranks(place.mesh.get_group(dim)))
                groups.setdefault(ranks, (i, dim))
                over.append(list(groups).index(ranks))
        spread.append(tuple(sorted(over)))
    sets = sorted(set(spread))

    pieces: list[list[int]] = []
    ratio_of_piece: list[int] = []
    tensor_of_piece: list[int] = []
    group_of_ratio: list[int] = []
    cells: list[tuple[int, Set]] = []
    first = 0
    for k, (size, adapted) in enumerate(zip(sizes, adapts, strict=True)):
        group, ratios = range(first, first + size), len(group_of_ratio)
        first += size
        length = -(-sum(places[i].shape.numel() for i in group) // slices) if slices else 0
        position = 0  # in the flattened group
        for i in group:
            place = places[i]
            if not adapted:
                cut = [(-1, place.numel)]
            elif not slices:
                cut = [(ratios + i - group[0], place.numel)]
            else:
                cut = [(ratios + j, n) for j, n in _pieces(place, position, length)]
                position += place.shape.numel()
            cut = [(ratio, n) for ratio, n in cut if n]
            pieces.append([n for _, n in cut])
            ratio_of_piece += [ratio for ratio, _ in cut]
            tensor_of_piece += [i] * len(cut)
        if adapted and not slices:
            group_of_ratio += [k] * size
            cells += [(ratios + i - group[0], spread[i]) for i in group]
        elif adapted:
            group_of_ratio += [k] * slices
            met = sorted({spread[i] for i in group})
            cells += [(ratios + j, over) for j in range(slices) for over in met]

    def numbers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    def sorted_into(found: list, bins: list) -> tuple[Tensor, Tensor]:
        """The places of what was found, in the order of the bins; how many each bin has."""
        number, order = {b: j for j, b in enumerate(bins)}, defaultdict(list)
        for j, f in enumerate(found):
            order[number[f]].append(j)
        return numbers(j for b in range(len(bins)) for j in order[b]), numbers(len(order[b]) for b in range(len(bins)))

    of_pieces = [(r, spread[i]) for r, i in zip(ratio_of_piece, tensor_of_piece, strict=True) if r >= 0]
    by_cell, per_cell = sorted_into(of_pieces, cells)
    by_set, per_set = sorted_into([over for over, p in zip(spread, places, strict=True) if p.numel], sets)
    everywhere = tuple(range(len(groups)))
    second = [over for _, over in cells]
    buffer = second + sets * limited + [everywhere] * scaled
    per_ratio = Counter(ratio for ratio, _ in cells)
    owners = [k for k, size in enumerate(sizes) for _ in range(size)]
    batches: list[list[int]] = []
    room = 0
    for i, place in enumerate(places):
        if place.numel > room or not batches:
            batches.append([])
            room = BATCH
        batches[-1].append(i)
        room -= place.numel
    return Plan(
        list(groups.values()),
        pieces,
        [numbers(j for j, over in enumerate(buffer) if group in over) for group in everywhere],
        [numbers(j for j, over in enumerate(second) if group in over) for group in everywhere],
        by_cell,
        per_cell,
        numbers(per_ratio[j] for j in range(len(group_of_ratio))),
        by_set,
        per_set,
        [i for i, k in enumerate(owners) if adapts[k]],
        numbers(owners),
        numbers(group_of_ratio),
        numbers(tensor_of_piece),
        numbers(r if r >= 0 else len(group_of_ratio) for r in ratio_of_piece),
        batches,
    )


def _pieces(place: Place, position: int, length: int) -> list[tuple[int, int]]:
    """Which slices of the flattened group this rank's part meets, with how many elements each, in order.

    The tensor begins at `position` of the group, slices have `length` elements. A box of a tensor has its elements in
    the tensor's order, whatever dimensions it is cut along: each slice takes a run of them.
    """
    whole = place.shape.numel()
    if not place.numel:
        return []
    slices = range(position // length, (position + whole - 1) // length + 1)
    if len(slices) == 1:
        return [(slices[0], place.numel)]
    box = _box(place)
    ends = [_before(min((j + 1) * length - position, whole), place.shape, box) for j in slices]
    return [(j, end - start) for j, start, end in zip(slices, [0, *ends], ends, strict=False)]


def _box(place: Place) -> list[tuple[int, int]]:
    """First index and size of this rank's part in each dimension, by the rule of torch.chunk."""
    box = [(0, size) for size in place.shape]
    coordinate: Sequence[int] = (place.mesh.get_coordinate() or ()) if place.mesh is not None else ()
    for dim, (placement, part) in enumerate(zip(place.placements, coordinate, strict=True)):
        if isinstance(placement, Shard):
            begin, size = box[placement.dim]
            assert place.mesh is not None
            length = -(-size // place.mesh.size(dim))
            skipped = min(part * length, size)
            box[placement.dim] = begin + skipped, min(length, size - skipped)
    if math.prod(size for _, size in box) != place.numel or any(
        type(p) not in (Shard, Replicate) for p in place.placements
    ):
        raise NotImplementedError(
            f"FusedLAMB: a parameter of shape {tuple(place.shape)} has placements {place.placements}, which "
            '("shard", R) cannot cut into slices; allowed are Shard and Replicate, so shard it on one mesh dimension, '
            'or use trust="parameter"'
        )
    return box


def _before(position: int, shape: Sequence[int], box: list[tuple[int, int]]) -> int:
    """How many elements of a box lie before a position in the flattened tensor."""
    count, inner, rest = 0, math.prod(shape), math.prod(size for _, size in box)
    for whole, (begin, size) in zip(shape, box, strict=True):
        inner //= whole
        rest //= size
        index, position = divmod(position, inner)
        count += min(max(index - begin, 0), size) * rest
        if not begin <= index < begin + size:
            break
    return count
