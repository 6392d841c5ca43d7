"""Token dropping by CUDA kernels (`csrc/tokens/`): ids drawn in one launch, rows and patches copied as bytes."""

import torch
from torch import Tensor

from evakernels import native


def refuses(op: str, *args) -> str | None:
    on = args[0]  # a device, or a tensor
    return native.refusal("tokens", (on if isinstance(on, torch.device) else on.device).type)


def sample_kept_tokens(device: torch.device, batch: int, patches: int, keep: int, seed: int, offset: Tensor) -> Tensor:
    kept = offset.new_empty((batch, keep), dtype=torch.int16, device=device)
    first, read = 0, None  # by value, or by the kernel: a captured CUDA graph then draws new ids at each replay
    if offset.device.type == "cpu":
        first = int(offset.item())
        if not 0 <= first < 2**63 - batch:
            raise ValueError(
                f"sample_kept_tokens: offset is {first}; it must lie between 0 and 2^63 - 1 - {batch}, the batch"
            )
    else:
        read = offset.to(kept.device)
    native.call("sample_kept_tokens", kept, kept, read, first, seed, batch, patches, keep)
    return kept


def gather_tokens(x: Tensor, kept: Tensor, prefix: int) -> Tensor:
    batch, tokens, channels = x.shape
    y = x.new_empty((batch, prefix + kept.shape[1], channels))
    _gather("gather_tokens", x, y, kept, prefix, tokens)
    return y


def gather_tokens_backward(dy: Tensor, kept: Tensor, prefix: int, tokens: int) -> Tensor:
    dx = dy.new_empty((dy.shape[0], tokens, dy.shape[2]))
    _gather("gather_tokens_backward", dy, dx, kept, prefix, tokens)
    return dx


def _gather(name: str, source: Tensor, to: Tensor, kept: Tensor, prefix: int, tokens: int) -> None:
    source = _rows_contiguous(source)
    row = to.shape[2] * to.element_size()
    native.call(
        name, to, source, to, *_byte_strides(source), *native.kept_ids(kept, tokens), to.shape[0], prefix, tokens, row
    )


def patchify(images: Tensor, rows: int, columns: int, kept: Tensor | None) -> Tensor:
    batch, channels, height, width = images.shape
    images = _rows_contiguous(images)
    ids = native.kept_ids(kept, (height // rows) * (width // columns))
    patches = images.new_empty((batch, ids[2], channels * rows * columns))
    _cut("patchify", images, patches, _byte_strides(images), ids, images, rows, columns)
    return patches


def patchify_backward(dy: Tensor, rows: int, columns: int, kept: Tensor | None, height: int, width: int) -> Tensor:
    dy = _rows_contiguous(dy)
    ids = native.kept_ids(kept, dy.shape[1])
    dimages = dy.new_empty((dy.shape[0], dy.shape[2] // (rows * columns), height, width))
    _cut("patchify_backward", dy, dimages, (*_byte_strides(dy), 0), ids, dimages, rows, columns)
    return dimages


def _cut(name: str, source: Tensor, to: Tensor, strides, ids: tuple, images: Tensor, rows: int, columns: int) -> None:
    batch, channels, height, width = images.shape
    grid = height // rows, width // columns
    native.call(name, to, source, to, *strides, *ids, batch, channels, *grid, rows, columns * to.element_size())


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _byte_strides(x: Tensor) -> tuple[int, ...]:
    """Of all dimensions but the last."""
    return tuple(stride * x.element_size() for stride in x.stride()[:-1])
