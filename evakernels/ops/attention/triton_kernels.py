"""Attention's Triton kernels: rotary embedding in two dimensions, online softmax, and its gradients.

A head's D channels are the widths that D in binary has, 16 at least: 88 is 64 + 32 of which 8 are masked, not 128. So a
tile of rows is a tuple of blocks, one for each width, and a product over channels the sum of theirs.

A tile that is turned has its pairs of channels side by side, whatever their order in memory: products over channels do
not mind, and gradients go back to where their channels came from.

Strides come in units of 8 elements: so the compiler knows that rows begin at multiples of 16 bytes.
"""

import triton
import triton.language as tl

from evakernels.jit import kernel


@triton.constexpr_function
def widths(head_dim):
    """The powers of two that a head's channels are cut into, the widest first."""
    units = -(-head_dim // 16)
    return tuple(16 << bit for bit in (3, 2, 1, 0) if units >> bit & 1)


@triton.constexpr_function
def firsts(head_dim):
    """The first channel of each of them."""
    units = -(-head_dim // 16)
    return tuple(16 * (units >> bit + 1 << bit + 1) for bit in (3, 2, 1, 0) if units >> bit & 1)


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# Where tiles lie


@triton.jit
def _program(blocks, heads):
    """The block of a head that this program has, the head and its sample; blocks of one head run side by side."""
    program = tl.program_id(0)
    head = program // blocks
    return program % blocks, head % heads, (head // heads).to(tl.int64)


@triton.jit
def _head(pointer, sample, head, by_sample, by_head):
    return pointer + 8 * (sample * by_sample + head.to(tl.int64) * by_head)


@triton.jit
def _rows(at, first, by_token, R: tl.constexpr):
    """Addresses of R rows from token `first` on, as a column."""
    by_token = 8 * by_token.to(tl.int64)
    return at + first * by_token + (tl.arange(0, R) * by_token)[:, None]


@triton.jit
def _contiguous(pointer, sample, head, first, tokens, heads, R: tl.constexpr, D: tl.constexpr):
    """As _rows, of a contiguous (B, N, H, D)."""
    by_token = heads * (D // 8)
    return _rows(_head(pointer, sample, head, tokens * by_token, D // 8), first, by_token, R)


@triton.jit
def _inside(valid, column, END: tl.constexpr, PARTIAL: tl.constexpr):
    mask = valid[:, None]
    if PARTIAL:
        mask = mask & (column < END)[None, :]
    return mask


@triton.jit
def _read(rows, valid, column, END: tl.constexpr, PARTIAL: tl.constexpr, EDGE: tl.constexpr):
    at = rows + column[None, :]
    if EDGE:
        return tl.load(at, mask=_inside(valid, column, END, PARTIAL), other=0.0)
    elif PARTIAL:
        return tl.load(at, mask=(column < END)[None, :], other=0.0)
    else:
        return tl.load(at)


# Rotation


@triton.jit
def _angles(rotation, sample, token, tokens, D: tl.constexpr, TURN: tl.constexpr):
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
    else:
        return None


@triton.jit
def _split(x):
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _join(x0, x1):
    return tl.reshape(tl.join(x0, x1), (x0.shape[0], 2 * x0.shape[1]))


@triton.jit
def _turn(x0, x1, angles, FIRST: tl.constexpr, D: tl.constexpr, BACK: tl.constexpr):
    """(x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin) for the pairs from channel FIRST on; BACK: by less the angle."""
    row, column, turned = angles
    c = FIRST + tl.arange(0, 2 * x0.shape[1])
    at = tl.where((c < D // 2)[None, :], row[:, None] + c[None, :], column[:, None] + (c - D // 2)[None, :])
    still = (1 - c % 2).to(tl.float32)[None, :]
    cos, sin = _split(tl.load(at, mask=turned[:, None] & (c < D)[None, :], other=still))
    if BACK:
        sin = -sin
    return x0 * cos - x1 * sin, x1 * cos + x0 * sin


@triton.jit
def _load_block(
    rows, valid, angles, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, HALVES: tl.constexpr,
    EDGE: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    PARTIAL: tl.constexpr = FIRST + WIDTH > D
    if HALVES and angles is not None:
        i = FIRST // 2 + tl.arange(0, WIDTH // 2)
        x0 = _read(rows, valid, i, D // 2, PARTIAL, EDGE)
        x1 = _read(rows + D // 2, valid, i, D // 2, PARTIAL, EDGE)
        x0, x1 = _turn(x0.to(tl.float32), x1.to(tl.float32), angles, FIRST, D, BACK)
        return _join(x0, x1).to(rows.dtype.element_ty)
    else:
        c = FIRST + tl.arange(0, WIDTH)
        x = _read(rows, valid, c, D, PARTIAL, EDGE)
        if angles is None:
            return x
        else:
            x0, x1 = _split(x.to(tl.float32))
            x0, x1 = _turn(x0, x1, angles, FIRST, D, BACK)
            return _join(x0, x1).to(x.dtype)


@triton.jit
def _load(rows, valid, angles, D: tl.constexpr, HALVES: tl.constexpr, EDGE: tl.constexpr, BACK: tl.constexpr = False):
    """A tile of rows: turned unless `angles` is None; 0 where not `valid`, which EDGE alone looks at."""
    tile = ()
    for i in tl.static_range(len(widths(D))):
        tile = tile + (_load_block(rows, valid, angles, firsts(D)[i], widths(D)[i], D, HALVES, EDGE, BACK),)
    return tile


@triton.jit
def _store_block(rows, valid, x, angles, FIRST: tl.constexpr, D: tl.constexpr, HALVES: tl.constexpr):
    PARTIAL: tl.constexpr = FIRST + x.shape[1] > D
    if angles is not None:
        x0, x1 = _split(x)
        x0, x1 = _turn(x0, x1, angles, FIRST, D, True)
        x = _join(x0, x1)
    x = x.to(rows.dtype.element_ty)
    if HALVES:
        i = FIRST // 2 + tl.arange(0, x.shape[1] // 2)
        mask = _inside(valid, i, D // 2, PARTIAL)
        x0, x1 = _split(x)
        tl.store(rows + i[None, :], x0, mask=mask)
        tl.store(rows + (D // 2 + i)[None, :], x1, mask=mask)
    else:
        c = FIRST + tl.arange(0, x.shape[1])
        tl.store(rows + c[None, :], x, mask=_inside(valid, c, D, PARTIAL))


@triton.jit
def _store(rows, valid, tile, angles, D: tl.constexpr, HALVES: tl.constexpr):
    """Stores the `valid` rows of a tile, turned back unless `angles` is None, rounded once."""
    for i in tl.static_range(len(tile)):
        _store_block(rows, valid, tile[i], angles, firsts(D)[i], D, HALVES)


@triton.jit
def _turn_head(
    x_ptr, to_ptr, x_sample, x_token, x_head, to_sample, to_token, to_head,
    sample, head, first, valid, angles, D: tl.constexpr, HALVES: tl.constexpr, KEEP: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = valid.shape[0]
    x = _rows(_head(x_ptr, sample, head, x_sample, x_head), first, x_token, R)
    to = _rows(_head(to_ptr, sample, head, to_sample, to_head), first, to_token, R)
    _store(to, valid, _load(x, valid, angles, D, HALVES, True, BACK), None, D, HALVES and KEEP)


@kernel
def turn(
    x_ptr, y_ptr, to_x_ptr, to_y_ptr, rows_ptr, columns_ptr, ids_ptr,
    x_sample, x_token, x_head, y_sample, y_token, y_head, to_sample, to_token, to_head,
    heads, share, tokens, prefix, patches, width,
    D: tl.constexpr, TOKENS: tl.constexpr, HALVES: tl.constexpr, KEEP: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Turns x, and y unless it is None, `share` heads a program. KEEP: channels keep their order in memory."""
    block, group, sample = _program(tl.cdiv(tokens, TOKENS), tl.cdiv(heads, share))
    first = block * TOKENS
    token = first + tl.arange(0, TOKENS)
    rotation = (rows_ptr, columns_ptr, ids_ptr, prefix, patches, width)
    angles = _angles(rotation, sample, token, tokens, D, True)
    for head in range(group * share, tl.minimum(group * share + share, heads)):
        _turn_head(
            x_ptr, to_x_ptr, x_sample, x_token, x_head, to_sample, to_token, to_head,
            sample, head, first, token < tokens, angles, D, HALVES, KEEP, BACK,
        )  # fmt: skip
        if y_ptr is not None:
            _turn_head(
                y_ptr, to_y_ptr, y_sample, y_token, y_head, to_sample, to_token, to_head,
                sample, head, first, token < tokens, angles, D, HALVES, KEEP, BACK,
            )  # fmt: skip


# Products of tiles


@triton.jit
def _zeros(R: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((R, WIDTH), tl.float32)


@triton.jit
def _zero_tile(R: tl.constexpr, D: tl.constexpr):
    tile = ()
    for i in tl.static_range(len(widths(D))):
        tile = tile + (_zeros(R, widths(D)[i]),)
    return tile


@triton.jit
def _over_channels(a, b):
    """a b^T"""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision="ieee")
    return product


@triton.jit
def _over_rows(weights, b, sums):
    """sums + weights b"""
    tile = ()
    for i in tl.static_range(len(b)):
        tile = tile + (tl.dot(weights, b[i], sums[i], input_precision="ieee"),)
    return tile


@triton.jit
def _row_sums(a, b):
    """rowsum(a * b)"""
    sums = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        sums += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return sums


@triton.jit
def _times(tile, factor):
    product = ()
    for i in tl.static_range(len(tile)):
        product = product + (tile[i] * factor,)
    return product


@triton.jit
def _sees(query, key, tokens, CAUSAL: tl.constexpr):
    if CAUSAL:
        return (key < tokens) & (key <= query)
    else:
        return key < tokens


# Forward


@triton.jit
def _attend(
    q, top, total, sums, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens, scale,
    D: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, TURN: tl.constexpr, HALVES: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Softmax with KEYS more keys: each query's largest score, the sum of its weights and its weighted sums."""
    key = start + tl.arange(0, KEYS)
    angles = _angles(rotation, sample, key, tokens, D, TURN)
    k = _load(_rows(k_at, start, k_token, KEYS), key < tokens, angles, D, HALVES, EDGE)
    v = _load(_rows(v_at, start, v_token, KEYS), key < tokens, None, D, False, EDGE)
    score = _over_channels(q, k)
    if EDGE:
        score = tl.where(_sees(query[:, None], key[None, :], tokens, CAUSAL), score, float("-inf"))
    now = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - now[:, None])
    shrink = tl.exp2(top - now)
    total = total * shrink + tl.sum(weight, 1)
    return now, total, _over_rows(weight.to(v[0].dtype), v, _times(sums, shrink[:, None]))


@kernel
def forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rows_ptr, columns_ptr, ids_ptr,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head,
    heads, tokens, prefix, patches, width, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    TURN_Q: tl.constexpr, TURN_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """A block of queries with all keys; `out` is contiguous. TURN_K: keys come as they are, not turned before."""
    blocks = tl.cdiv(tokens, QUERIES)
    block, head, sample = _program(blocks, heads)
    if CAUSAL:
        block = blocks - 1 - block  # what takes longest first
    first = block * QUERIES
    query = first + tl.arange(0, QUERIES)
    rotation = (rows_ptr, columns_ptr, ids_ptr, prefix, patches, width)
    scale = scale * LOG2_E

    angles = _angles(rotation, sample, query, tokens, D, TURN_Q)
    q_at = _rows(_head(q_ptr, sample, head, q_sample, q_head), first, q_token, QUERIES)
    q = _load(q_at, query < tokens, angles, D, HALVES, True)
    k_at, v_at = _head(k_ptr, sample, head, k_sample, k_head), _head(v_ptr, sample, head, v_sample, v_head)

    whole, end = tokens // KEYS * KEYS, tokens
    if CAUSAL:
        whole, end = tl.minimum(whole, (first + 1) // KEYS * KEYS), tl.minimum(first + QUERIES, tokens)
    top, total = tl.full((QUERIES,), float("-inf"), tl.float32), tl.zeros((QUERIES,), tl.float32)
    sums = _zero_tile(QUERIES, D)
    for start in tl.range(0, whole, KEYS):
        top, total, sums = _attend(
            q, top, total, sums, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens, scale,
            D, KEYS, CAUSAL, TURN_K, HALVES, False,
        )  # fmt: skip
    for start in tl.range(whole, end, KEYS, num_stages=1):
        top, total, sums = _attend(
            q, top, total, sums, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens, scale,
            D, KEYS, CAUSAL, TURN_K, HALVES, True,
        )  # fmt: skip

    row = sample * heads + head
    out_at = _contiguous(out_ptr, sample, head, first, tokens, heads, QUERIES, D)
    _store(out_at, query < tokens, _times(sums, (1 / total)[:, None]), None, D, False)
    tl.store(lse_ptr + row * tokens + query, (top + tl.log2(total)) * LN_2, mask=query < tokens)


# Backward


@triton.jit
def _statistic(pointer, row, token, tokens, other, EDGE: tl.constexpr):
    if EDGE:
        return tl.load(pointer + row * tokens + token, mask=token < tokens, other=other)
    else:
        return tl.load(pointer + row * tokens + token)


@triton.jit
def _differentiate(
    q, dout, lse, delta, dq, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens, scale,
    D: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, TURN: tl.constexpr, HALVES: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """dq with KEYS more keys."""
    key = start + tl.arange(0, KEYS)
    angles = _angles(rotation, sample, key, tokens, D, TURN)
    k = _load(_rows(k_at, start, k_token, KEYS), key < tokens, angles, D, HALVES, EDGE)
    v = _load(_rows(v_at, start, v_token, KEYS), key < tokens, None, D, False, EDGE)
    weight = tl.exp2(_over_channels(q, k) * scale - lse[:, None])
    if EDGE:
        weight = tl.where(_sees(query[:, None], key[None, :], tokens, CAUSAL), weight, 0.0)
    dscore = weight * (_over_channels(dout, v) - delta[:, None])
    return _over_rows(dscore.to(k[0].dtype), k, dq)


@kernel
def backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, rows_ptr, columns_ptr, ids_ptr,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head,
    dout_sample, dout_token, dout_head, dq_sample, dq_token, dq_head,
    heads, tokens, prefix, patches, width, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
    TURN: tl.constexpr, TURN_BACK: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and their delta for `backward_keys`. TURN: q and k come as they are."""
    blocks = tl.cdiv(tokens, QUERIES)
    block, head, sample = _program(blocks, heads)
    if CAUSAL:
        block = blocks - 1 - block
    first, row = block * QUERIES, sample * heads + head
    query = first + tl.arange(0, QUERIES)
    rotation = (rows_ptr, columns_ptr, ids_ptr, prefix, patches, width)

    dout_at = _rows(_head(dout_ptr, sample, head, dout_sample, dout_head), first, dout_token, QUERIES)
    dout = _load(dout_at, query < tokens, None, D, False, True)
    out_at = _contiguous(out_ptr, sample, head, first, tokens, heads, QUERIES, D)
    delta = _row_sums(_load(out_at, query < tokens, None, D, False, True), dout)
    tl.store(delta_ptr + row * tokens + query, delta, mask=query < tokens)

    angles = _angles(rotation, sample, query, tokens, D, TURN)
    q_at = _rows(_head(q_ptr, sample, head, q_sample, q_head), first, q_token, QUERIES)
    q = _load(q_at, query < tokens, angles, D, HALVES, True)
    # An infinite sum gives the queries that do not exist no weights.
    lse = _statistic(lse_ptr, row, query, tokens, float("inf"), True) * LOG2_E
    k_at, v_at = _head(k_ptr, sample, head, k_sample, k_head), _head(v_ptr, sample, head, v_sample, v_head)

    whole, end = tokens // KEYS * KEYS, tokens
    if CAUSAL:
        whole, end = tl.minimum(whole, (first + 1) // KEYS * KEYS), tl.minimum(first + QUERIES, tokens)
    dq = _zero_tile(QUERIES, D)
    for start in tl.range(0, whole, KEYS):
        dq = _differentiate(
            q, dout, lse, delta, dq, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens,
            scale * LOG2_E, D, KEYS, CAUSAL, TURN, HALVES, False,
        )  # fmt: skip
    for start in tl.range(whole, end, KEYS, num_stages=1):
        dq = _differentiate(
            q, dout, lse, delta, dq, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens,
            scale * LOG2_E, D, KEYS, CAUSAL, TURN, HALVES, True,
        )  # fmt: skip

    angles = _angles(rotation, sample, query, tokens, D, TURN_BACK)
    dq_at = _rows(_head(dq_ptr, sample, head, dq_sample, dq_head), first, dq_token, QUERIES)
    _store(dq_at, query < tokens, _times(dq, scale), angles, D, HALVES)


@triton.jit
def _differentiate_by_keys(
    k, v, dk, dv, q_at, out_ptr, dout_at, dq_at, q_token, dout_token, dq_token, lse_ptr, delta_ptr,
    rotation, sample, head, heads, key, start, tokens, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, TURN: tl.constexpr,
    TURN_BACK: tl.constexpr, HALVES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk and dv with QUERIES more queries; where the keys are WHOLE, also those queries' dq."""
    query, row = start + tl.arange(0, QUERIES), sample * heads + head
    angles = _angles(rotation, sample, query, tokens, D, TURN)
    q = _load(_rows(q_at, start, q_token, QUERIES), query < tokens, angles, D, HALVES, EDGE)
    dout = _load(_rows(dout_at, start, dout_token, QUERIES), query < tokens, None, D, False, EDGE)
    if WHOLE:
        out = _load(_contiguous(out_ptr, sample, head, start, tokens, heads, QUERIES, D), query < tokens, None, D, False, EDGE)
        delta = _row_sums(out, dout)
    else:
        delta = _statistic(delta_ptr, row, query, tokens, 0.0, EDGE)
    lse = _statistic(lse_ptr, row, query, tokens, float("inf"), EDGE) * LOG2_E
    weight = tl.exp2(_over_channels(k, q) * (scale * LOG2_E) - lse[None, :])  # a row has one key's
    if WHOLE or (EDGE and CAUSAL):
        weight = tl.where(_sees(query[None, :], key[:, None], tokens, CAUSAL), weight, 0.0)
    dv = _over_rows(weight.to(v[0].dtype), dout, dv)
    dscore = (weight * (_over_channels(v, dout) - delta[None, :])).to(k[0].dtype)
    if WHOLE:
        dq = _over_rows(tl.trans(dscore), k, _zero_tile(QUERIES, D))
        _store(_rows(dq_at, start, dq_token, QUERIES), query < tokens, _times(dq, scale), angles, D, HALVES)
    return _over_rows(dscore, q, dk), dv


@kernel
def backward_keys(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, rows_ptr, columns_ptr, ids_ptr,
    q_sample, q_token, q_head, k_sample, k_token, k_head, v_sample, v_token, v_head,
    dout_sample, dout_token, dout_head, dq_sample, dq_token, dq_head,
    heads, tokens, prefix, patches, width, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    TURN: tl.constexpr, TURN_BACK: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys. WHOLE: the block has all keys, and dq is made here too, in five products."""
    block, head, sample = _program(tl.cdiv(tokens, KEYS), heads)
    first = block * KEYS
    key = first + tl.arange(0, KEYS)
    rotation = (rows_ptr, columns_ptr, ids_ptr, prefix, patches, width)

    angles = _angles(rotation, sample, key, tokens, D, TURN)
    k_at = _rows(_head(k_ptr, sample, head, k_sample, k_head), first, k_token, KEYS)
    k = _load(k_at, key < tokens, angles, D, HALVES, True)
    v_at = _rows(_head(v_ptr, sample, head, v_sample, v_head), first, v_token, KEYS)
    v = _load(v_at, key < tokens, None, D, False, True)
    q_at, dout_at = _head(q_ptr, sample, head, q_sample, q_head), _head(dout_ptr, sample, head, dout_sample, dout_head)
    dq_at = _head(dq_ptr, sample, head, dq_sample, dq_head)

    # Tiles of queries that see all of these keys; and others: on the diagonal, and the last.
    whole, diagonal, diagonals = tokens // QUERIES * QUERIES, 0, 0
    if CAUSAL and not WHOLE:
        diagonal = first // QUERIES * QUERIES
        diagonals = tl.cdiv(tl.minimum(first + KEYS, tokens) - diagonal, QUERIES)
    if WHOLE:
        diagonals, whole = tl.cdiv(tokens, QUERIES), tokens
    after = diagonal + diagonals * QUERIES
    last = ((whole < tokens) & (whole >= after)).to(tl.int32)
    dk, dv = _zero_tile(KEYS, D), _zero_tile(KEYS, D)
    if not WHOLE:
        for start in tl.range(after, whole, QUERIES):
            dk, dv = _differentiate_by_keys(
                k, v, dk, dv, q_at, out_ptr, dout_at, dq_at, q_token, dout_token, dq_token, lse_ptr,
                delta_ptr, rotation, sample, head, heads, key, start, tokens, scale,
                D, QUERIES, CAUSAL, WHOLE, TURN, TURN_BACK, HALVES, False,
            )  # fmt: skip
    for i in tl.range(0, diagonals + last, num_stages=1):
        start = tl.where(i < diagonals, diagonal + i * QUERIES, whole)
        dk, dv = _differentiate_by_keys(
            k, v, dk, dv, q_at, out_ptr, dout_at, dq_at, q_token, dout_token, dq_token, lse_ptr,
            delta_ptr, rotation, sample, head, heads, key, start, tokens, scale,
            D, QUERIES, CAUSAL, WHOLE, TURN, TURN_BACK, HALVES, True,
        )  # fmt: skip

    angles = _angles(rotation, sample, key, tokens, D, TURN_BACK)
    dk_at = _rows(_head(dk_ptr, sample, head, dq_sample, dq_head), first, dq_token, KEYS)
    _store(dk_at, key < tokens, _times(dk, scale), angles, D, HALVES)
    dv_at = _rows(_head(dv_ptr, sample, head, dq_sample, dq_head), first, dq_token, KEYS)
    _store(dv_at, key < tokens, dv, None, D, False)
