"""Token dropping in plain PyTorch: Philox in integer arithmetic, gathers by row, scatters of unique ids."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85


def sample_kept_tokens(device: torch.device, batch: int, patches: int, keep: int, seed: int, offset: Tensor) -> Tensor:
    first = offset.to(device).view(1, 1)
    if first.device.type == "cpu" and not 0 <= first.item() < 2**63 - batch:
        raise ValueError(
            f"sample_kept_tokens: offset is {first.item()}; it must lie between 0 and 2^63 - 1 - {batch}, the batch"
        )
    row = first + torch.arange(batch, device=device)[:, None]
    block = torch.arange(-(-patches // 4), device=device)
    words = philox((block, torch.zeros_like(block), row & MASK, row >> 32), (seed & MASK, seed >> 32))
    return smallest(torch.stack(words, -1).flatten(1)[:, :patches], keep)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on 32-bit words held in int64: a product that wraps around still has the right 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((b >> 32) & MASK) ^ c1 ^ k0, b & MASK, ((a >> 32) & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def smallest(keys: Tensor, keep: int) -> Tensor:
    """Ascending ids of the `keep` smallest 32-bit keys of each row; of equal keys, the lower ids."""
    pairs = keys << 15 | torch.arange(keys.shape[1], device=keys.device)
    kept = pairs.topk(keep, largest=False, sorted=False).values & 0x7FFF
    return kept.sort().values.to(torch.int16)


def gather_tokens(x: Tensor, kept: Tensor, prefix: int) -> Tensor:
    batch, tokens, channels = x.shape
    rows = _rows("gather_tokens", kept, prefix, tokens)
    return x.reshape(batch * tokens, channels).index_select(0, rows).view(batch, prefix + kept.shape[1], channels)


def gather_tokens_backward(dy: Tensor, kept: Tensor, prefix: int, tokens: int) -> Tensor:
    batch, _, channels = dy.shape
    rows = _rows("gather_tokens", kept, prefix, tokens, unique=True)
    dx = dy.new_zeros(batch * tokens, channels)
    return dx.index_copy_(0, rows, dy.flatten(0, 1)).view(batch, tokens, channels)


def patchify(images: Tensor, rows: int, columns: int, kept: Tensor | None) -> Tensor:
    patches = _patches(images, rows, columns)
    if kept is not None:
        patches = patches[_places("patchify", kept, patches)]
    return patches.flatten(-3).flatten(1, -2).contiguous()


def patchify_backward(dy: Tensor, rows: int, columns: int, kept: Tensor | None, height: int, width: int) -> Tensor:
    dimages = dy.new_zeros(dy.shape[0], dy.shape[2] // (rows * columns), height, width)
    patches = _patches(dimages, rows, columns)
    if kept is None:
        patches.copy_(dy.reshape(patches.shape))
    else:
        patches[_places("patchify", kept, patches, unique=True)] = dy.reshape(*kept.shape, *patches.shape[3:])
    return dimages


def _patches(images: Tensor, rows: int, columns: int) -> Tensor:
    """A view (B, grid rows, grid columns, C, rows, columns) of the image."""
    return images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).permute(0, 2, 4, 1, 3, 5)


def _places(function: str, kept: Tensor, patches: Tensor, unique: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    batch, grid_rows, grid_columns = patches.shape[:3]
    ids = _ids(function, kept, grid_rows * grid_columns, unique)
    return torch.arange(batch, device=ids.device)[:, None], ids // grid_columns, ids % grid_columns


def _rows(function: str, kept: Tensor, prefix: int, tokens: int, unique: bool = False) -> Tensor:
    """The rows, in x flattened to (B * tokens, C), of the prefix and the kept tokens of every sample."""
    ids = _ids(function, kept, tokens - prefix, unique) + prefix
    always = torch.arange(prefix, device=ids.device).expand(ids.shape[0], -1)
    first = torch.arange(ids.shape[0], device=ids.device)[:, None] * tokens
    return (torch.cat([always, ids], 1) + first).flatten()


def _ids(function: str, kept: Tensor, patches: int, unique: bool) -> Tensor:
    """The ids as int64: checked on the CPU; elsewhere, where a check would wait for the device, clamped."""
    ids = kept.long()
    if ids.device.type != "cpu":
        return ids.clamp(0, patches - 1)
    wrong = (ids < 0) | (ids >= patches)
    if wrong.any():
        sample, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{function}: kept[{sample}, {place}] is {ids[sample, place]}; ids must lie between 0 and {patches - 1}"
        )
    if unique:
        counts = ids.new_zeros((ids.shape[0], patches), dtype=torch.bool).scatter_(1, ids, True).sum(1)
        if (counts < ids.shape[1]).any():
            sample = int((counts < ids.shape[1]).nonzero()[0])
            raise ValueError(f"{function}: kept[{sample}] holds an id twice; the ids of a sample must be unique")
    return ids
