"""Both contrastive losses by two Triton kernels over tiles of S; all other products are the library's.

    lse_tiles            a tile of S, and nothing of it stored: maximum and sum of exponentials of its rows and of its
                         columns, and whether a sample's own logit is beaten there; a small kernel puts tiles together
    softmax_grad_tiles   S again, and from it the weights W, rounded to the features' dtype, rows x columns of a chunk;
                         then dimage += W text and dtext += W' image, summed up in float32

**What rounding W would cost** is kept out of the gradients, in float32. A sample's weight to its own pair, in which the
softmaxes and the label cancel, is no part of W. And what all features have in common cancels in the sum over a row of
W, which is almost nothing, but not in that over its roundings: what each row and each column has lost by rounding is
summed up, and given back in the direction of the mean feature. So is what smoothing subtracts from all weights alike.
The gradient of the scale comes from W before it is rounded.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from evakernels import jit
from evakernels.ops.contrastive import streamed
from evakernels.ops.contrastive import triton_kernels as kernels
from evakernels.ops.contrastive.streamed import Side, Statistics

# Texts of all ranks in a chunk. By formula: W text has a long inner dimension then, W' image many rows, and what a rank
# sends and gets at a time is 21 MB of 16-bit features of width 640.
COLUMNS = 16384
# Of W at a time. By formula: W and the sums that its products are added to, float32 of width D, cost the memory 6 bytes
# for each element of W and 8 D for each of its rows and columns; for 4096 x 16384 in 16 bits at D = 1024 that makes 720
# FLOP for a byte, and an H100 does 300 in the time of one.
BYTES = 128 << 20
RETURNS_PRODUCT = True  # `contrastive_gradients` returns it
# float16 has its 11 bits from 6e-5 on, and weights are about 2 / n; they are at most 2.
HALF_SCALE = 2.0**14


class Config(NamedTuple):
    rows: int  # of a tile of S
    columns: int
    k: int  # how much of the features' width is multiplied at a time
    warps: int  # of a program of `lse_tiles`
    gradient_warps: int  # of `softmax_grad_tiles`
    stages: int


def config(itemsize: int, capability: tuple[int, int]) -> Config:
    """The tile, the same in all kernels, so that equal features have equal logits wherever they are computed.

    By formula: two programs of 4 warps share a multiprocessor's registers, 255 a thread, of which half hold the 128 x
    128 sums; while one is at its exponentials the other multiplies. The stages of both fit shared memory: 2 x 96 KiB of
    an H100's, whose tensor cores read 64 elements at a time, 2 x 48 KiB before. `softmax_grad_tiles` has more to hold
    and more variants, of which some would not fit 255 registers: it has the sums in twice as many threads, and a
    multiprocessor for itself. float32 is multiplied in true float32, not on tensor cores, and a smaller tile does.
    """
    if itemsize == 4:
        return Config(64, 64, 32, warps=4, gradient_warps=4, stages=2)
    k, stages = (64, 3) if capability >= (9, 0) else (32, 4)
    return Config(128, 128, k, warps=4, gradient_warps=8, stages=stages)


def chunk(ranks: int, features: Tensor) -> int:
    """How many texts of each rank to gather at once: `COLUMNS` of all ranks, in whole tiles."""
    return max(128, COLUMNS // ranks // 128 * 128)


def refuses(op: str, image: Tensor, text: Tensor, *others) -> str | None:
    """Why the kernels cannot serve this call, in a sentence; None when they can."""
    return jit.refusal(image, text)


def contrastive_forward(image, text, scale, smoothing, row_mask, group, sizes):
    return streamed.contrastive_loss(TILES, *alike(image, text), scale, smoothing, row_mask, group, sizes)


def contrastive_with_gradients(image, text, scale, smoothing, row_mask, group, sizes, wants_image, wants_text):
    loss, accuracies, *gradients, dscale = streamed.contrastive_loss(
        TILES, *alike(image, text), scale, smoothing, row_mask, group, sizes, (wants_image, wants_text)
    )
    return loss, accuracies, *(narrowed(x, image.shape[1]) for x in gradients), dscale


def sigmoid_forward(image, text, scale, bias, group, sizes):
    return streamed.sigmoid_loss(TILES, *alike(image, text), scale, bias, group, sizes)


def sigmoid_with_gradients(image, text, scale, bias, group, sizes, wants_image, wants_text):
    loss, *gradients, dscale, dbias = streamed.sigmoid_loss(
        TILES, *alike(image, text), scale, bias, group, sizes, (wants_image, wants_text)
    )
    return loss, *(narrowed(x, image.shape[1]) for x in gradients), dscale, dbias


def alike(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both as the kernels read them: contiguous rows of whole 16 bytes, in one dtype, which has the values of both."""
    dtype = torch.promote_types(image.dtype, text.dtype)
    missing = -image.shape[1] % (16 // dtype.itemsize)
    image, text = ((F.pad(x, (0, missing)) if missing else x).to(dtype).contiguous() for x in (image, text))
    return image, text


def narrowed(gradient: Tensor, width: int) -> Tensor:
    """Without what `alike` has added."""
    return gradient if gradient.dim() == 1 else gradient[:, :width].contiguous()


def positives(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """(b,): the diagonal of S, bit for bit as the tiles have it."""
    out, tile = scale.new_empty(len(image)), _config(image)
    grid = (triton.cdiv(len(image), min(tile.rows, tile.columns)),)
    jit.launch(kernels.positives, grid, image, text, scale, out, len(image), **_options(tile, image))
    return out


def statistics(rows: Side, columns: Side, scale: Tensor) -> tuple[Statistics, Statistics]:
    """Of the rows and of the columns of a block of S."""
    image, text, tile = rows.features, columns.features, _config(rows.features)
    down, across = triton.cdiv(len(image), tile.rows), triton.cdiv(len(text), tile.columns)
    of_rows, of_columns = scale.new_empty(3, across, len(image)), scale.new_empty(3, down, len(text))
    jit.launch(
        *(kernels.lse_tiles, (down * across,), image, text, scale, rows.positive, columns.positive),
        *(rows.places(), columns.places(), of_rows, of_columns, len(image), len(text)),
        **_options(tile, image),
    )
    return _all_tiles(of_rows), _all_tiles(of_columns)


def _all_tiles(of_tiles: Tensor) -> Statistics:
    _, parts, length = of_tiles.shape
    out = of_tiles.new_empty(3, length)
    jit.launch(kernels.together, (triton.cdiv(length, 64),), of_tiles, out, parts, length, PARTS=16, LENGTH=64)
    return Statistics(*out.unbind())


def contrastive_gradients(
    rows: Side, columns: Side, scale: Tensor, smoothing: float, samples: int, share: float,
    dimage: Tensor | None, dtext: Tensor | None,
) -> Tensor:  # fmt: skip
    """Add share * W text to dimage and share * W' image to dtext, where they are wanted; returns <share W, S - middle>.

    Without middle, nearly equal logits would cancel in <W, S>.
    """
    uniform = 2 * smoothing / samples
    product = _add_products(rows, columns, scale, None, uniform, share, dimage, dtext)[0]
    if smoothing:
        means = (side.features.mean(0, dtype=torch.float64) for side in (rows, columns))
        pairs = len(rows.features) * len(columns.features)
        product -= uniform * pairs * (scale * torch.dot(*means) - rows.middle)
    for i, j in own_pairs(rows, columns):
        both = ((rows, i), (columns, j))
        softmaxes = [(side.positive[part] - side.maximum[part]).exp_() / side.total[part] for side, part in both]
        w = softmaxes[0] + softmaxes[1] - 2 * (1 - smoothing)
        product += torch.dot(w.double(), rows.positive[i].double() - rows.middle)
        _add_own(w, rows, columns, i, j, share, dimage, dtext)
    return product * share


def sigmoid_gradients(
    rows: Side, columns: Side, scale: Tensor, bias: Tensor, share: float, dimage: Tensor | None, dtext: Tensor | None
) -> Tensor:
    """As `contrastive_gradients`, but returns, in float64, the sums of the losses and of W over the block."""
    bias = bias.to(scale.dtype).reshape(())
    sums = _add_products(rows, columns, scale, bias, 0.0, share, dimage, dtext)
    for i, j in own_pairs(rows, columns):
        z = -(positives(rows.features[i], columns.features[j], scale) + bias)
        w = -z.sigmoid()
        sums += torch.stack((F.softplus(z, threshold=40.0), w)).sum(1, dtype=torch.float64)
        _add_own(w, rows, columns, i, j, share, dimage, dtext)
    return sums


def _add_products(rows, columns, scale, bias, uniform, share, dimage, dtext) -> Tensor:
    """Of all pairs that are no sample's own; returns the kernel's sums, float64. The sigmoid loss has a bias."""
    image, text, tile = rows.features, columns.features, _config(rows.features)
    row_place, column_place = rows.places(), columns.places()
    wanted, rounds = dimage is not None or dtext is not None, image.dtype != torch.float32
    height, pitch = weights_at_a_time(len(image), len(text), image.element_size(), tile) if wanted else (len(image), 0)
    w = image.new_empty(height, pitch) if wanted else None
    w_scale = HALF_SCALE if image.dtype == torch.float16 else 1.0
    sums = scale.new_zeros(2, dtype=torch.float64)
    # What is in the direction of the mean feature: lost by rounding, less what smoothing subtracts.
    of_columns = scale.new_full((len(text),), -uniform * len(image))
    mean_text = text.mean(0, dtype=scale.dtype) if dimage is not None and (rounds or uniform) else None

    for begin in range(0, len(image), height):
        part = slice(begin, min(begin + height, len(image)))
        length = part.stop - begin
        down, across = triton.cdiv(length, tile.rows), triton.cdiv(len(text), tile.columns)
        of_tiles = scale.new_empty(down * across, 2)
        row_lost = scale.new_empty(across, length) if rounds and dimage is not None else None
        column_lost = scale.new_empty(down, len(text)) if rounds and dtext is not None else None
        jit.launch(
            *(kernels.softmax_grad_tiles, (down * across,), image[part], text, scale, bias, rows.middle),
            *(None if x is None else x[part] for x in (rows.maximum, rows.total)),
            *(columns.maximum, columns.total, row_place[part], column_place, w, row_lost, column_lost, of_tiles),
            *(length, len(text), pitch // 8),
            **_options(tile, image) | {"warps": tile.gradient_warps},
            W_SCALE=w_scale,
        )
        sums += of_tiles.sum(0, dtype=torch.float64)
        if w is not None:
            weights = w[:length, : len(text)]
            if dimage is not None:
                _add_product(dimage[part], weights, text, share / w_scale)
            if dtext is not None:
                _add_product(dtext, weights.t(), image[part], share / w_scale)
        if mean_text is not None:
            of_rows = scale.new_full((length,), -uniform * len(text))
            of_rows = of_rows if row_lost is None else of_rows + row_lost.sum(0)
            dimage[part].addr_(of_rows, mean_text, alpha=share)
        if column_lost is not None:
            of_columns += column_lost.sum(0)
    if dtext is not None and (rounds or uniform):
        dtext.addr_(of_columns, image.mean(0, dtype=scale.dtype), alpha=share)
    return sums


def weights_at_a_time(rows: int, columns: int, itemsize: int, tile: Config) -> tuple[int, int]:
    """How many rows of W are computed at a time, whole tiles of at most `BYTES`, and how long each is in memory."""
    pitch = triton.cdiv(columns, 64) * 64
    return min(rows, max(1, BYTES // (pitch * itemsize) // tile.rows) * tile.rows), pitch


def own_pairs(rows: Side, columns: Side) -> Iterator[tuple[slice, slice]]:
    """The samples that are among the rows and among the columns: where in each."""
    for r in rows.segments:
        for c in columns.segments:
            first, last = max(r.first, c.first), min(r.first + r.length, c.first + c.length)
            if first < last:
                i, j = (slice(s.begin + first - s.first, s.begin + last - s.first) for s in (r, c))
                yield i, j


def _add_own(w, rows: Side, columns: Side, i: slice, j: slice, share: float, dimage, dtext) -> None:
    if dimage is not None:
        dimage[i].addcmul_(w.unsqueeze(1), columns.features[j], value=share)
    if dtext is not None:
        dtext[j].addcmul_(w.unsqueeze(1), rows.features[i], value=share)


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """out += alpha * a b, summed up in float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=alpha)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=alpha, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=alpha)


def _config(features: Tensor) -> Config:
    return config(features.element_size(), jit.capability(features.device))


def _options(tile: Config, features: Tensor) -> dict:
    sizes = {"WIDTH": features.shape[1], "ROWS": tile.rows, "COLUMNS": tile.columns, "K": tile.k}
    return {"warps": tile.warps, "stages": tile.stages, **sizes}


TILES = sys.modules[__name__]
