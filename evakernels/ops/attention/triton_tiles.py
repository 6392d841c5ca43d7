"""Tiles of rows of a head, for Triton: loaded and stored, turned by rotary embedding on the way, multiplied.

A head's D channels are cut as D is in binary, into 16 at least: 88 is 64 + 32, of which 8 are masked, not 128. So rows
are a tuple of blocks, one for each width, and a product over channels is the sum of theirs.

A tile that is turned has its pairs of channels side by side, whatever their order in memory: products over channels do
not mind, and gradients go back to where their channels came from.

Strides come in units of 8 elements: so the compiler knows that rows begin at multiples of 16 bytes.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def widths(head_dim):
    """The powers of two that a head's channels are cut into, the widest first."""
    units = -(-head_dim // 16)
    units += units == 7  # of three blocks the compiler needs more registers than of one of 128
    return tuple(16 << bit for bit in (3, 2, 1, 0) if units >> bit & 1)


@triton.constexpr_function
def firsts(head_dim):
    """The first channel of each of them."""
    cuts = widths(head_dim)
    return tuple(sum(cuts[:i]) for i in range(len(cuts)))


@triton.jit
def append(tile, block):
    return tile + (block,)  # noqa: RUF005


# Where tiles lie


@triton.jit
def program_of(blocks, heads):
    """The block of a head that this program has, the head and its sample; blocks of one head run side by side."""
    program = tl.program_id(0)
    head = program // blocks
    return program % blocks, head % heads, (head // heads).to(tl.int64)


@triton.jit
def head_at(pointer, sample, head, by_sample, by_head):
    return pointer + 8 * (sample * by_sample + tl.cast(head, tl.int64) * by_head)


@triton.jit
def rows_at(at, first, by_token, R: tl.constexpr):
    """Addresses of R rows from token `first` on, as a column."""
    by_token = 8 * by_token.to(tl.int64)
    return at + first * by_token + (tl.arange(0, R) * by_token)[:, None]


@triton.jit
def contiguous_at(pointer, sample, head, first, tokens, heads, R: tl.constexpr, D: tl.constexpr):
    """As `rows_at`, of a contiguous (B, N, H, D)."""
    by_token = heads * (D // 8)
    return rows_at(head_at(pointer, sample, head, tokens * by_token, D // 8), first, by_token, R)


@triton.jit
def statistic(pointer, row, token, tokens, EDGE: tl.constexpr):
    if EDGE:
        return tl.load(pointer + row * tokens + token, mask=token < tokens, other=0.0)
    else:
        return tl.load(pointer + row * tokens + token)


@triton.jit
def inside(valid, column, END: tl.constexpr, PARTIAL: tl.constexpr):
    mask = valid[:, None]
    if PARTIAL:
        mask = mask & (column < END)[None, :]
    return mask


@triton.jit
def read(rows, valid, column, END: tl.constexpr, PARTIAL: tl.constexpr, EDGE: tl.constexpr):
    at = rows + column[None, :]
    if EDGE:
        return tl.load(at, mask=inside(valid, column, END, PARTIAL), other=0.0)
    elif PARTIAL:
        return tl.load(at, mask=(column < END)[None, :], other=0.0)
    else:
        return tl.load(at)


# Rotation


@triton.jit
def angles_of(rotation, sample, token, tokens, D: tl.constexpr, TURN: tl.constexpr):
    """Of each token: where the angles of its patch's row lie and of its column, and whether it is turned at all."""
    if TURN:
        rows_ptr, columns_ptr, ids_ptr, prefix, patches, width = rotation
        place = token - prefix
        turned = (place >= 0) & (token < tokens)
        if ids_ptr is None:
            patch = place
        else:
            patch = tl.load(ids_ptr + sample * (tokens - prefix) + place, mask=turned, other=0).to(tl.int64)
        patch = tl.minimum(tl.maximum(patch, 0), patches - 1).to(tl.int32)  # whatever memory holds
        row = patch // width
        return rows_ptr + row * (D // 2), columns_ptr + (patch - row * width) * (D // 2), turned


@triton.jit
def split_pairs(x):
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def join_pairs(x0, x1):
    return tl.reshape(tl.join(x0, x1), (x0.shape[0], 2 * x0.shape[1]))


@triton.jit
def turn_pairs(x0, x1, angles, FIRST: tl.constexpr, D: tl.constexpr, BACK: tl.constexpr):
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for the pairs from channel FIRST on; BACK: by less the angle."""
    row, column, turned = angles
    c = FIRST + tl.arange(0, 2 * x0.shape[1])
    at = tl.where((c < D // 2)[None, :], row[:, None] + c[None, :], column[:, None] + (c - D // 2)[None, :])
    still = (1 - c % 2).to(tl.float32)[None, :]
    cos, sin = split_pairs(tl.load(at, mask=turned[:, None] & (c < D)[None, :], other=still))
    if BACK:
        sin = -sin
    return x0 * cos - x1 * sin, x1 * cos + x0 * sin


@triton.jit
def load_block(
    rows, valid, angles, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, HALVES: tl.constexpr,
    EDGE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    PARTIAL: tl.constexpr = FIRST + WIDTH > D
    if HALVES and angles is not None:
        i = FIRST // 2 + tl.arange(0, WIDTH // 2)
        x0 = read(rows, valid, i, D // 2, PARTIAL, EDGE)
        x1 = read(rows + D // 2, valid, i, D // 2, PARTIAL, EDGE)
        x0, x1 = turn_pairs(x0.to(tl.float32), x1.to(tl.float32), angles, FIRST, D, BACK)
        return join_pairs(x0, x1).to(rows.dtype.element_ty)
    else:
        c = FIRST + tl.arange(0, WIDTH)
        x = read(rows, valid, c, D, PARTIAL, EDGE)
        if angles is None:
            return x
        else:
            x0, x1 = split_pairs(x.to(tl.float32))
            x0, x1 = turn_pairs(x0, x1, angles, FIRST, D, BACK)
            return join_pairs(x0, x1).to(x.dtype)


@triton.jit
def load_tile(
    rows, valid, angles, D: tl.constexpr, HALVES: tl.constexpr, EDGE: tl.constexpr, BACK: tl.constexpr = False
):
    """A tile of rows: turned unless `angles` is None; 0 where not `valid`, which EDGE alone looks at."""
    tile = ()
    for i in tl.static_range(len(widths(D))):
        tile = append(tile, load_block(rows, valid, angles, firsts(D)[i], widths(D)[i], D, HALVES, EDGE, BACK))
    return tile


@triton.jit
def store_block(rows, valid, x, angles, FIRST: tl.constexpr, D: tl.constexpr, HALVES: tl.constexpr):
    PARTIAL: tl.constexpr = FIRST + x.shape[1] > D
    if angles is not None:
        x0, x1 = split_pairs(x)
        x0, x1 = turn_pairs(x0, x1, angles, FIRST, D, True)
        x = join_pairs(x0, x1)
    x = x.to(rows.dtype.element_ty)
    if HALVES:
        i = FIRST // 2 + tl.arange(0, x.shape[1] // 2)
        mask = inside(valid, i, D // 2, PARTIAL)
        x0, x1 = split_pairs(x)
        tl.store(rows + i[None, :], x0, mask=mask)
        tl.store(rows + (D // 2 + i)[None, :], x1, mask=mask)
    else:
        c = FIRST + tl.arange(0, x.shape[1])
        tl.store(rows + c[None, :], x, mask=inside(valid, c, D, PARTIAL))


@triton.jit
def store_tile(rows, valid, tile, angles, D: tl.constexpr, HALVES: tl.constexpr):
    """Stores the `valid` rows of a tile, turned back unless `angles` is None, rounded once."""
    for i in tl.static_range(len(tile)):
        store_block(rows, valid, tile[i], angles, firsts(D)[i], D, HALVES)


# Products of tiles


@triton.jit
def zero_block(R: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((R, WIDTH), tl.float32)


@triton.jit
def zero_tile(R: tl.constexpr, D: tl.constexpr):
    tile = ()
    for i in tl.static_range(len(widths(D))):
        tile = append(tile, zero_block(R, widths(D)[i]))
    return tile


@triton.jit
def over_channels(a, b):
    """a b^T"""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision="ieee")
    return product


@triton.jit
def over_rows(weights, b, sums):
    """sums + weights b"""
    tile = ()
    for i in tl.static_range(len(b)):
        tile = append(tile, tl.dot(weights, b[i], sums[i], input_precision="ieee"))
    return tile


@triton.jit
def row_sums(a, b):
    """rowsum(a * b)"""
    sums = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        sums += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return sums


@triton.jit
def scaled(tile, factor):
    product = ()
    for i in tl.static_range(len(tile)):
        product = append(product, tile[i] * factor)
    return product


@triton.jit
def sees(query, key, tokens, CAUSAL: tl.constexpr):
    if CAUSAL:
        return (key < tokens) & (key <= query)
    else:
        return key < tokens
