"""Attention's Triton kernels: the rotation alone; forward, with online softmax; and its gradients.

Rows of tiles are queries or keys. What streams past a block of queries is keys, and the other way round.
"""

import triton
import triton.language as tl

from evakernels.jit import kernel
from evakernels.ops.attention.triton_tiles import (
    LN_2,
    LOG2_E,
    angles_of,
    contiguous_at,
    head_at,
    load_tile,
    over_channels,
    over_rows,
    program_of,
    row_sums,
    rows_at,
    scaled,
    sees,
    statistic,
    store_tile,
    zero_tile,
)


@triton.jit
def turn_head(
    x_ptr, to_ptr, x_sample, x_token, x_head, to_sample, to_token, to_head,
    sample, head, first, valid, angles, D: tl.constexpr, HALVES: tl.constexpr, KEEP: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = valid.shape[0]
    x = rows_at(head_at(x_ptr, sample, head, x_sample, x_head), first, x_token, R)
    to = rows_at(head_at(to_ptr, sample, head, to_sample, to_head), first, to_token, R)
    store_tile(to, valid, load_tile(x, valid, angles, D, HALVES, True, BACK), None, D, HALVES and KEEP)


@kernel
def turn(
    x_ptr, y_ptr, to_x_ptr, to_y_ptr, rows_ptr, columns_ptr, ids_ptr,
    x_sample, x_token, x_head, y_sample, y_token, y_head, to_sample, to_token, to_head,
    heads, share, tokens, prefix, patches, width,
    D: tl.constexpr, TOKENS: tl.constexpr, HALVES: tl.constexpr, KEEP: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Turns x, and y unless it is None, `share` heads a program. KEEP: channels keep their order in memory."""
    block, group, sample = program_of(tl.cdiv(tokens, TOKENS), tl.cdiv(heads, share))
    first = block * TOKENS
    token = first + tl.arange(0, TOKENS)
    rotation = (rows_ptr, columns_ptr, ids_ptr, prefix, patches, width)
    angles = angles_of(rotation, sample, token, tokens, D, True)
    for head in range(group * share, tl.minimum(group * share + share, heads)):
        turn_head(
            x_ptr, to_x_ptr, x_sample, x_token, x_head, to_sample, to_token, to_head,
            sample, head, first, token < tokens, angles, D, HALVES, KEEP, BACK,
        )  # fmt: skip
        if y_ptr is not None:
            turn_head(
                y_ptr, to_y_ptr, y_sample, y_token, y_head, to_sample, to_token, to_head,
                sample, head, first, token < tokens, angles, D, HALVES, KEEP, BACK,
            )  # fmt: skip


# Forward


@triton.jit
def attend(
    q, top, total, sums, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens, scale,
    D: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, TURN: tl.constexpr, HALVES: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Softmax with KEYS more keys: each query's largest score, the sum of its weights and its weighted sums."""
    key = start + tl.arange(0, KEYS)
    angles = angles_of(rotation, sample, key, tokens, D, TURN)
    k = load_tile(rows_at(k_at, start, k_token, KEYS), key < tokens, angles, D, HALVES, EDGE)
    v = load_tile(rows_at(v_at, start, v_token, KEYS), key < tokens, None, D, False, EDGE)
    score = over_channels(q, k)
    if EDGE:
        score = tl.where(sees(query[:, None], key[None, :], tokens, CAUSAL), score, float("-inf"))
    now = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - now[:, None])
    shrink = tl.exp2(top - now)
    total = total * shrink + tl.sum(weight, 1)
    return now, total, over_rows(weight.to(v[0].dtype), v, scaled(sums, shrink[:, None]))


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
    block, head, sample = program_of(blocks, heads)
    if CAUSAL:
        block = blocks - 1 - block  # what takes longest first
    first = block * QUERIES
    query = first + tl.arange(0, QUERIES)
    rotation = (rows_ptr, columns_ptr, ids_ptr, prefix, patches, width)
    scale = scale * LOG2_E

    angles = angles_of(rotation, sample, query, tokens, D, TURN_Q)
    q_at = rows_at(head_at(q_ptr, sample, head, q_sample, q_head), first, q_token, QUERIES)
    q = load_tile(q_at, query < tokens, angles, D, HALVES, True)
    k_at, v_at = head_at(k_ptr, sample, head, k_sample, k_head), head_at(v_ptr, sample, head, v_sample, v_head)

    whole, end = tokens // KEYS * KEYS, tokens
    if CAUSAL:
        whole, end = tl.minimum(whole, (first + 1) // KEYS * KEYS), tl.minimum(first + QUERIES, tokens)
    top, total = tl.full((QUERIES,), float("-inf"), tl.float32), tl.zeros((QUERIES,), tl.float32)
    sums = zero_tile(QUERIES, D)
    for start in tl.range(0, whole, KEYS):
        top, total, sums = attend(
            q, top, total, sums, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens, scale,
            D, KEYS, CAUSAL, TURN_K, HALVES, False,
        )  # fmt: skip
    for start in tl.range(whole, end, KEYS, num_stages=1):
        top, total, sums = attend(
            q, top, total, sums, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens, scale,
            D, KEYS, CAUSAL, TURN_K, HALVES, True,
        )  # fmt: skip

    row = sample * heads + head
    out_at = contiguous_at(out_ptr, sample, head, first, tokens, heads, QUERIES, D)
    store_tile(out_at, query < tokens, scaled(sums, (1 / total)[:, None]), None, D, False)
    tl.store(lse_ptr + row * tokens + query, (top + tl.log2(total)) * LN_2, mask=query < tokens)


# Backward


@triton.jit
def differentiate_queries(
    q, dout, lse, delta, dq, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens, scale,
    D: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, TURN: tl.constexpr, HALVES: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """dq with KEYS more keys."""
    key = start + tl.arange(0, KEYS)
    angles = angles_of(rotation, sample, key, tokens, D, TURN)
    k = load_tile(rows_at(k_at, start, k_token, KEYS), key < tokens, angles, D, HALVES, EDGE)
    v = load_tile(rows_at(v_at, start, v_token, KEYS), key < tokens, None, D, False, EDGE)
    weight = tl.exp2(over_channels(q, k) * scale - lse[:, None])
    if EDGE:
        weight = tl.where(sees(query[:, None], key[None, :], tokens, CAUSAL), weight, 0.0)
    dscore = weight * (over_channels(dout, v) - delta[:, None])
    return over_rows(dscore.to(k[0].dtype), k, dq)


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
    block, head, sample = program_of(blocks, heads)
    if CAUSAL:
        block = blocks - 1 - block
    first, row = block * QUERIES, sample * heads + head
    query = first + tl.arange(0, QUERIES)
    rotation = (rows_ptr, columns_ptr, ids_ptr, prefix, patches, width)

    dout_at = rows_at(head_at(dout_ptr, sample, head, dout_sample, dout_head), first, dout_token, QUERIES)
    dout = load_tile(dout_at, query < tokens, None, D, False, True)
    out_at = contiguous_at(out_ptr, sample, head, first, tokens, heads, QUERIES, D)
    delta = row_sums(load_tile(out_at, query < tokens, None, D, False, True), dout)
    tl.store(delta_ptr + row * tokens + query, delta, mask=query < tokens)

    angles = angles_of(rotation, sample, query, tokens, D, TURN)
    q_at = rows_at(head_at(q_ptr, sample, head, q_sample, q_head), first, q_token, QUERIES)
    q = load_tile(q_at, query < tokens, angles, D, HALVES, True)
    lse = statistic(lse_ptr, row, query, tokens, True) * LOG2_E
    k_at, v_at = head_at(k_ptr, sample, head, k_sample, k_head), head_at(v_ptr, sample, head, v_sample, v_head)

    whole, end = tokens // KEYS * KEYS, tokens
    if CAUSAL:
        whole, end = tl.minimum(whole, (first + 1) // KEYS * KEYS), tl.minimum(first + QUERIES, tokens)
    dq = zero_tile(QUERIES, D)
    for start in tl.range(0, whole, KEYS):
        dq = differentiate_queries(
            q, dout, lse, delta, dq, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens,
            scale * LOG2_E, D, KEYS, CAUSAL, TURN, HALVES, False,
        )  # fmt: skip
    for start in tl.range(whole, end, KEYS, num_stages=1):
        dq = differentiate_queries(
            q, dout, lse, delta, dq, k_at, v_at, k_token, v_token, rotation, sample, query, start, tokens,
            scale * LOG2_E, D, KEYS, CAUSAL, TURN, HALVES, True,
        )  # fmt: skip

    angles = angles_of(rotation, sample, query, tokens, D, TURN_BACK)
    dq_at = rows_at(head_at(dq_ptr, sample, head, dq_sample, dq_head), first, dq_token, QUERIES)
    store_tile(dq_at, query < tokens, scaled(dq, scale), angles, D, HALVES)


@triton.jit
def differentiate_keys(
    k, v, dk, dv, q_at, out_ptr, dout_at, dq_at, q_token, dout_token, dq_token, lse_ptr, delta_ptr,
    rotation, sample, head, heads, key, start, tokens, scale,
    D: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr, TURN: tl.constexpr,
    HALVES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """dk and dv with QUERIES more queries; where the keys are WHOLE, and come as they are, also those queries' dq.

    Queries that do not exist add nothing: what they would add is times their q or dout, which are 0.
    """
    query, row = start + tl.arange(0, QUERIES), sample * heads + head
    angles = angles_of(rotation, sample, query, tokens, D, TURN)
    q = load_tile(rows_at(q_at, start, q_token, QUERIES), query < tokens, angles, D, HALVES, EDGE)
    dout = load_tile(rows_at(dout_at, start, dout_token, QUERIES), query < tokens, None, D, False, EDGE)
    if WHOLE:
        out = load_tile(
            contiguous_at(out_ptr, sample, head, start, tokens, heads, QUERIES, D), query < tokens, None, D, False, EDGE
        )
        delta = row_sums(out, dout)
    else:
        delta = statistic(delta_ptr, row, query, tokens, EDGE)
    lse = statistic(lse_ptr, row, query, tokens, EDGE) * LOG2_E
    weight = tl.exp2(over_channels(k, q) * (scale * LOG2_E) - lse[None, :])  # a row has one key's
    if WHOLE or (EDGE and CAUSAL):
        weight = tl.where(sees(query[None, :], key[:, None], tokens, CAUSAL), weight, 0.0)
    dv = over_rows(weight.to(v[0].dtype), dout, dv)
    dscore = (weight * (over_channels(v, dout) - delta[None, :])).to(k[0].dtype)
    if WHOLE:
        dq = over_rows(tl.trans(dscore), k, zero_tile(QUERIES, D))
        store_tile(rows_at(dq_at, start, dq_token, QUERIES), query < tokens, scaled(dq, scale), angles, D, HALVES)
    return over_rows(dscore, q, dk), dv


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
    block, head, sample = program_of(tl.cdiv(tokens, KEYS), heads)
    first = block * KEYS
    key = first + tl.arange(0, KEYS)
    rotation = (rows_ptr, columns_ptr, ids_ptr, prefix, patches, width)

    angles = angles_of(rotation, sample, key, tokens, D, TURN)
    k_at = rows_at(head_at(k_ptr, sample, head, k_sample, k_head), first, k_token, KEYS)
    k = load_tile(k_at, key < tokens, angles, D, HALVES, True)
    v_at = rows_at(head_at(v_ptr, sample, head, v_sample, v_head), first, v_token, KEYS)
    v = load_tile(v_at, key < tokens, None, D, False, True)
    q_at = head_at(q_ptr, sample, head, q_sample, q_head)
    dout_at = head_at(dout_ptr, sample, head, dout_sample, dout_head)
    dq_at = head_at(dq_ptr, sample, head, dq_sample, dq_head)

    # Tiles of queries that see all of these keys; and others: on the diagonal, and the last.
    whole, diagonal, diagonals = tokens // QUERIES * QUERIES, 0, 0
    if CAUSAL and not WHOLE:
        diagonal = first // QUERIES * QUERIES
        diagonals = tl.cdiv(tl.minimum(first + KEYS, tokens) - diagonal, QUERIES)
    if WHOLE:
        diagonals, whole = tl.cdiv(tokens, QUERIES), tokens
    after = diagonal + diagonals * QUERIES
    last = ((whole < tokens) & (whole >= after)).to(tl.int32)
    dk, dv = zero_tile(KEYS, D), zero_tile(KEYS, D)
    if not WHOLE:
        for start in tl.range(after, whole, QUERIES):
            dk, dv = differentiate_keys(
                k, v, dk, dv, q_at, out_ptr, dout_at, dq_at, q_token, dout_token, dq_token, lse_ptr,
                delta_ptr, rotation, sample, head, heads, key, start, tokens, scale,
                D, QUERIES, CAUSAL, WHOLE, TURN, HALVES, False,
            )  # fmt: skip
    for i in tl.range(0, diagonals + last, num_stages=1):
        start = tl.where(i < diagonals, diagonal + i * QUERIES, whole)
        dk, dv = differentiate_keys(
            k, v, dk, dv, q_at, out_ptr, dout_at, dq_at, q_token, dout_token, dq_token, lse_ptr,
            delta_ptr, rotation, sample, head, heads, key, start, tokens, scale,
            D, QUERIES, CAUSAL, WHOLE, TURN, HALVES, True,
        )  # fmt: skip

    angles = angles_of(rotation, sample, key, tokens, D, TURN_BACK)
    dk_at = rows_at(head_at(dk_ptr, sample, head, dq_sample, dq_head), first, dq_token, KEYS)
    store_tile(dk_at, key < tokens, scaled(dk, scale), angles, D, HALVES)
    dv_at = rows_at(head_at(dv_ptr, sample, head, dq_sample, dq_head), first, dq_token, KEYS)
    store_tile(dv_at, key < tokens, dv, None, D, False)
