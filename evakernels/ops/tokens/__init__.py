"""Token dropping: draw the patches to keep, keep their tokens, or cut only them out of the image."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evakernels.dispatch import define
from evakernels.ops import checks

MOST_PATCHES = 32767  # so that ids, and the number of patches, fit int16


def sample_kept_tokens(
    batch: int,
    patches: int,
    keep: int,
    *,
    seed: int,
    offset: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw for each sample `keep` of `patches` patches, uniformly without replacement, by a counter-based generator.

    Row r depends on `seed`, `patches`, `keep` and the sample's global index `offset + r` alone: not on the batch it
    is drawn in, nor on the device. Every implementation draws the same ids, as follows. Philox4x32-10 with the key
    (seed mod 2^32, seed >> 32) maps the counter (j, 0, row mod 2^32, row >> 32), row = offset + r, to four 32-bit
    words: the sort keys of the patches 4j, 4j + 1, 4j + 2 and 4j + 3. The `keep` smallest pairs (sort key, patch id),
    in lexicographic order, are kept.

    Args:
        batch: the number of rows B.
        patches: patches of an image, 1 to 32767, prefix tokens not counted.
        keep: how many of them to keep, K, 1 to `patches`.
        seed: 0 to 2^63 - 1.
        offset: global index of the first sample, 0 to 2^63 - 1 - batch; an int, or a one-element int64 tensor
            (on `device`, for a captured CUDA graph to draw new ids at each replay).
        device: where the ids are drawn; by default that of an `offset` tensor, else the CPU.

    Returns:
        (B, K) int16, each row ascending.

    Raises:
        ValueError, TypeError: an argument is out of its range.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    function = "sample_kept_tokens"
    if batch < 0 or not 1 <= patches <= MOST_PATCHES or not 1 <= keep <= patches:
        raise ValueError(
            f"{function}: batch is {batch}, patches {patches}, keep {keep}; needed are batch >= 0,"
            f" 1 <= patches <= {MOST_PATCHES} and 1 <= keep <= patches"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"{function}: seed is {seed}; it must lie between 0 and 2^63 - 1")
    if isinstance(offset, Tensor):
        if offset.dtype != torch.int64 or offset.numel() != 1:
            raise TypeError(
                f"{function}: offset is a {offset.dtype} tensor of shape {tuple(offset.shape)}; pass an int or a"
                " one-element int64 tensor"
            )
        device = offset.device if device is None else torch.device(device)
        if offset.device.type not in ("cpu", device.type):
            raise ValueError(f"{function}: offset is on {offset.device}, but the ids are drawn on {device}; move it")
    else:
        if not 0 <= offset < 2**63 - batch:
            raise ValueError(f"{function}: offset is {offset}; it must lie between 0 and 2^63 - 1 - batch")
        device = torch.device("cpu" if device is None else device)
        offset = torch.full((1,), offset, dtype=torch.int64, device="cpu")
    return _sample_kept_tokens(device, batch, patches, keep, seed, offset)


def gather_tokens(x: Tensor, kept: Tensor, *, prefix_tokens: int = 1) -> Tensor:
    """Keep the prefix tokens and the chosen patch tokens of each sample.

    Args:
        x: (B, P + patches, C), any dtype.
        kept: (B, K) patch ids, prefix not counted, any integer dtype, any order, unique in a row.
        prefix_tokens: P, the tokens in front that are always kept (CLS).

    Returns:
        (B, P + K, C), the patches in the order of `kept`; dropped tokens get gradient zero.

    Raises:
        ValueError: a shape or device does not fit; on the CPU also: an id lies outside 0 ... patches - 1, or (in the
            backward pass) occurs twice. On CUDA the first are clamped, the second get the gradient of one occurrence.
        TypeError: `kept` has no integer dtype.

    Source: Li et al., Scaling Language-Image Pre-training via Masking (FLIP), arXiv 2212.00794.
    """
    function = "gather_tokens"
    if x.dim() != 3 or not 0 <= prefix_tokens <= x.shape[1]:
        raise ValueError(
            f"{function}: x has shape {tuple(x.shape)} and prefix_tokens is {prefix_tokens}; x must be (batch, tokens,"
            " channels) and hold the prefix"
        )
    _check_kept(function, x, kept, x.shape[1] - prefix_tokens)
    if checks.needs_grad(x):
        return _GatherTokens.apply(x, kept, prefix_tokens)
    return _gather_tokens(x, kept, prefix_tokens)


def patchify(images: Tensor, patch: int | tuple[int, int], kept: Tensor | None = None) -> Tensor:
    """Cut images into flat patches, all of them or only the kept ones; only these are read.

    `patchify(images, p) @ conv.weight.flatten(1).T + conv.bias` is the patch embedding `conv = Conv2d(C, D, p, p)`.

    Args:
        images: (B, C, H, W), any dtype.
        patch: p, or (rows, columns); H and W must be multiples of it.
        kept: (B, K) patch ids in row-major order, any integer dtype, any order, unique in a row; None for all.

    Returns:
        (B, K or all patches, C * rows * columns), a row in the order of Conv2d's weight; dropped patches get
        gradient zero.

    Raises:
        ValueError: a shape or device does not fit; on the CPU also: an id lies outside 0 ... patches - 1, or (in the
            backward pass) occurs twice. On CUDA the first are clamped, the second get the gradient of one occurrence.
        TypeError: `kept` has no integer dtype.
    """
    function = "patchify"
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    if images.dim() != 4 or rows < 1 or columns < 1 or images.shape[2] % rows or images.shape[3] % columns:
        raise ValueError(
            f"{function}: images have shape {tuple(images.shape)} and a patch is {rows} x {columns}; images must be"
            " (batch, channels, height, width), height and width multiples of the patch's"
        )
    if kept is not None:
        _check_kept(function, images, kept, (images.shape[2] // rows) * (images.shape[3] // columns))
    if checks.needs_grad(images):
        return _Patchify.apply(images, rows, columns, kept)
    return _patchify(images, rows, columns, kept)


def _check_kept(function: str, x: Tensor, kept: Tensor, patches: int) -> None:
    if kept.dtype.is_floating_point or kept.dtype.is_complex or kept.dtype == torch.bool:
        raise TypeError(f"{function}: kept has dtype {kept.dtype}; patch ids need an integer dtype")
    if kept.dim() != 2 or kept.shape[0] != x.shape[0] or kept.shape[1] > patches:
        raise ValueError(
            f"{function}: kept has shape {tuple(kept.shape)}, expected ({x.shape[0]}, at most {patches}): unique ids of"
            " the patches of each sample"
        )
    checks.same_device(function, x, kept=kept)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept, prefix):
        ctx.save_for_backward(kept)
        ctx.prefix, ctx.tokens = prefix, x.shape[1]
        return _gather_tokens(x, kept, prefix)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _gather_tokens_backward(dy, ctx.saved_tensors[0], ctx.prefix, ctx.tokens), None, None


class _Patchify(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, rows, columns, kept):
        ctx.save_for_backward(kept)
        ctx.patch, ctx.size = (rows, columns), images.shape[2:]
        return _patchify(images, rows, columns, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _patchify_backward(dy, *ctx.patch, ctx.saved_tensors[0], *ctx.size), None, None, None


# `device` comes first: an int offset travels as a tensor on the CPU wherever the ids are drawn.
_sample_kept_tokens = define(
    "tokens",
    "sample_kept_tokens(Device device, SymInt batch, SymInt patches, SymInt keep, SymInt seed, Tensor offset)"
    " -> Tensor",
    lambda device, batch, patches, keep, seed, offset: offset.new_empty(
        (batch, keep), dtype=torch.int16, device=device
    ),
)
_gather_tokens = define(
    "tokens",
    "gather_tokens(Tensor x, Tensor kept, SymInt prefix) -> Tensor",
    lambda x, kept, prefix: x.new_empty((x.shape[0], prefix + kept.shape[1], x.shape[2])),
)
_gather_tokens_backward = define(
    "tokens",
    "gather_tokens_backward(Tensor dy, Tensor kept, SymInt prefix, SymInt tokens) -> Tensor",
    lambda dy, kept, prefix, tokens: dy.new_empty((dy.shape[0], tokens, dy.shape[2])),
)
_patchify = define(
    "tokens",
    "patchify(Tensor images, SymInt rows, SymInt columns, Tensor? kept) -> Tensor",
    lambda images, rows, columns, kept: images.new_empty(
        (
            images.shape[0],
            (images.shape[2] // rows) * (images.shape[3] // columns) if kept is None else kept.shape[1],
            images.shape[1] * rows * columns,
        )
    ),
)
_patchify_backward = define(
    "tokens",
    "patchify_backward(Tensor dy, SymInt rows, SymInt columns, Tensor? kept, SymInt height, SymInt width) -> Tensor",
    lambda dy, rows, columns, kept, height, width: dy.new_empty(
        (dy.shape[0], dy.shape[2] // (rows * columns), height, width)
    ),
)
