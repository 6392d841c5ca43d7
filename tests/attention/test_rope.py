"""The angles of a grid of patches, and the rotation alone."""

import copy

import numerics
import pytest
import torch
from shapes import HEAD_DIMS
from torch import nn
from torch.library import opcheck

import evakernels as ek

OPS = torch.ops.evakernels
IMPLEMENTATIONS = ("reference", "cpu")


def heads(batch, tokens, heads, head_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)


def full_tables(grid, head_dim, theta=10000.0, reference=16):
    """cos and sin of every channel of every patch, (patches, D) in float64, angle by angle as the paper writes them."""
    height, width = grid
    angles = torch.zeros(height * width, head_dim, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            for i in range(head_dim // 4):
                frequency = theta ** (-2 * i / (head_dim / 2))
                t_row = row / height * reference if reference else row
                t_column = column / width * reference if reference else column
                angles[row * width + column, 2 * i : 2 * i + 2] = t_row * frequency
                angles[row * width + column, head_dim // 2 + 2 * i : head_dim // 2 + 2 * i + 2] = t_column * frequency
    return angles.cos(), angles.sin()


def by_tables(x, cos, sin, prefix):
    """x * cos + rot(x) * sin with rot(x) = [-x1, x0, -x3, x2, ...], the prefix untouched."""
    rot = torch.empty_like(x)
    rot[..., 0::2], rot[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    turned = x * cos[:, None].to(x.dtype) + rot * sin[:, None].to(x.dtype)
    return torch.cat((x[:, :prefix], turned[:, prefix:]), 1)


def with_prefix(cos, sin, prefix):
    return (
        torch.cat((torch.ones(prefix, cos.shape[1], dtype=cos.dtype), cos)),
        torch.cat((torch.zeros(prefix, sin.shape[1], dtype=sin.dtype), sin)),
    )


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with ek.using(request.param):
        yield request.param


def test_tables_hold_the_published_angles():
    """Values of the EVA-CLIP checkpoints' own tables: B/16 on 14 x 14, L/14 at 336 pixels on 24 x 24."""
    base, large = ek.Rope2d(14, 64), ek.Rope2d(24, 64)
    assert base.row_table.shape == base.column_table.shape == (14, 16, 2)
    close = {"rtol": 0, "atol": 1e-7}
    cos = [0.4149966538, 0.8004949093, 0.9354016185]  # patch 16: row 1, column 2
    torch.testing.assert_close(base.row_table[1, :3, 0], torch.tensor(cos), **close)
    cos = [-0.6555555463, 0.2815841734, 0.7499523163]
    torch.testing.assert_close(base.column_table[2, :3, 0], torch.tensor(cos), **close)
    sin = torch.tensor([-0.1905678809, 0.9542440772, 5.927597522e-4])  # patch 127: row 5, column 7
    torch.testing.assert_close(large.row_table[5, [0, 1, 15], 1], sin, **close)
    sin = torch.tensor([-0.9989548922, 0.4945640564, 8.298635948e-4])
    torch.testing.assert_close(large.column_table[7, [0, 1, 15], 1], sin, **close)


@pytest.mark.parametrize("reference_grid", [16, 24.5, None])
def test_tables_are_the_formula_rounded_once(reference_grid):
    rope = ek.Rope2d((3, 5), 24, theta=100.0, reference_grid=reference_grid)
    cos, sin = full_tables((3, 5), 24, theta=100.0, reference=reference_grid)
    rows = torch.stack((cos[::5, :12:2], sin[::5, :12:2]), -1).float()
    columns = torch.stack((cos[:5, 12::2], sin[:5, 12::2]), -1).float()
    # One ulp: r / h * t and r * t / h differ in the last place of float64.
    torch.testing.assert_close(rope.row_table, rows, rtol=2e-7, atol=1e-12)
    torch.testing.assert_close(rope.column_table, columns, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 7), (4, 4)])
def test_rotation_is_that_of_full_tables(implementation, grid, prefix):
    rope = ek.Rope2d(grid, 40, prefix_tokens=prefix)
    x = heads(2, prefix + grid[0] * grid[1], 3, 40, torch.float64)
    expected = by_tables(x, *with_prefix(*full_tables(grid, 40), prefix), prefix)
    torch.testing.assert_close(ek.apply_rope(x, rope), expected, rtol=0, atol=1e-6)  # tables are float32


def test_rotation_is_timms(implementation):
    layers = pytest.importorskip("timm.layers")
    timm = layers.RotaryEmbeddingCat(64, in_pixels=False, feat_shape=[6, 9], ref_feat_shape=[16, 16])
    x = heads(2, 55, 3, 64)
    theirs = layers.apply_rot_embed_cat(x[:, 1:].transpose(1, 2), timm.get_embed()).transpose(1, 2)
    ours = ek.apply_rope(x, ek.Rope2d((6, 9), 64))
    torch.testing.assert_close(ours[:, 1:], theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[:, :1], x[:, :1])


def test_half_split_pairs_are_interleaved_pairs_in_another_order(implementation):
    x = heads(2, 16, 3, 48)
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    interleaved = ek.apply_rope(x, ek.Rope2d((3, 5), 48))
    split = ek.apply_rope(halves, ek.Rope2d((3, 5), 48, interleaved=False))
    torch.testing.assert_close(split, torch.cat((interleaved[..., 0::2], interleaved[..., 1::2]), -1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_kept_patches_keep_the_angles_of_their_place(implementation, prefix, dtype):
    rope = ek.Rope2d((4, 7), 64, prefix_tokens=prefix)
    x = heads(3, prefix + 28, 2, 64)
    kept = torch.stack([torch.randperm(28, generator=torch.Generator().manual_seed(s))[:9] for s in range(3)])
    tokens = torch.cat((torch.arange(prefix).expand(3, -1), kept + prefix), 1)

    def gather(x):
        return x[torch.arange(3)[:, None], tokens]

    actual = ek.apply_rope(gather(x), rope, kept.to(dtype))
    assert torch.equal(actual, gather(ek.apply_rope(x, rope)))


def test_rotating_back_restores_and_gradients_are_exact(implementation):
    rope = ek.Rope2d((2, 3), 8)
    x = heads(2, 7, 2, 8, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ek.apply_rope(x, rope), x)
    y = ek.apply_rope(x, rope)
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach(), rtol=1e-6, atol=1e-6)  # cos^2 + sin^2 of float32 tables
    split = ek.Rope2d((2, 3), 8, interleaved=False)
    kept = torch.tensor([[5, 0], [2, 3]])
    assert torch.autograd.gradcheck(lambda x: ek.apply_rope(x[:, :3], split, kept), x)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_as_exact_as_one_rounding_of_float32(implementation, head_dim, dtype, interleaved):
    rope = ek.Rope2d((3, 5), head_dim, interleaved=interleaved)
    x = heads(2, 16, 3, head_dim, dtype)
    with ek.using("reference"):
        oracle = ek.apply_rope(x.double(), rope)
        peer = ek.apply_rope(x.float(), rope).to(dtype)
    actual = ek.apply_rope(x, rope)
    assert actual.dtype == dtype
    numerics.assert_as_exact_as(actual, peer, oracle, numerics.OUTPUTS)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack((x, x), -1)[..., 0],
        lambda x: torch.cat((x[..., :1], x), -1)[..., 1:],
        lambda x: torch.cat((torch.zeros(1), x.flatten()))[1:].view(x.shape),
        lambda x: torch.stack((x, x, x), 2)[:, :, 1],
    ],
    ids=["heads first", "strided channels", "odd row stride", "odd offset", "packed"],
)
def test_any_strides_give_a_contiguous_result(implementation, view):
    rope, x = ek.Rope2d((3, 5), 64), heads(2, 16, 3, 64)
    actual = ek.apply_rope(view(x), rope)
    assert actual.is_contiguous()
    assert torch.equal(actual, ek.apply_rope(x, rope))


def test_module_has_no_state_and_stays_float32():
    rope = ek.Rope2d((3, 5), 32)
    rows, columns = rope.row_table.clone(), rope.column_table.clone()
    assert not rope.state_dict() and not list(rope.parameters())
    model = nn.ModuleList([rope, nn.Linear(2, 2)])
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)):
        cast(model)
        assert rope.row_table.dtype == rope.column_table.dtype == torch.float32
        assert torch.equal(rope.row_table, rows) and torch.equal(rope.column_table, columns)
    assert torch.equal(copy.deepcopy(rope).column_table, columns)
    before = rope.row_table
    assert rope.to("cpu").row_table is before


def test_tables_are_right_after_the_meta_device():
    expected = ek.Rope2d((3, 5), 32)
    with torch.device("meta"):
        rope = ek.Rope2d((3, 5), 32)
    assert rope.row_table.is_meta
    for _ in range(2):  # from meta, and then over memory that holds something else
        rope.to_empty(device="cpu")
        assert torch.equal(rope.row_table, expected.row_table)
        assert torch.equal(rope.column_table, expected.column_table)
    assert rope.to("meta").column_table.is_meta


@pytest.mark.parametrize("bad", [-1, -300, 15, 32767])
def test_an_id_outside_the_grid_raises(implementation, bad):
    kept = torch.tensor([[0, 14, 3], [2, bad, 7]], dtype=torch.int16)
    with pytest.raises(ValueError, match=rf"patch id {bad}, but a grid of 3 x 5 has the ids 0 to 14"):
        ek.apply_rope(heads(2, 4, 2, 32), ek.Rope2d((3, 5), 32), kept)


def test_the_worst_id_is_named(implementation):
    with pytest.raises(ValueError, match="patch id 99"):
        ek.apply_rope(heads(1, 4, 2, 32), ek.Rope2d((3, 5), 32), torch.tensor([[-7, 99, 15]]))


def test_no_kept_patch_at_all_leaves_the_prefix(implementation):
    x = heads(2, 1, 2, 32)
    assert torch.equal(ek.apply_rope(x, ek.Rope2d(3, 32), torch.zeros(2, 0, dtype=torch.int16)), x)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_passes_opcheck(implementation, interleaved, dtype):
    rope, kept = ek.Rope2d((2, 3), 32), torch.tensor([[5, 0, 1]] * 2, dtype=torch.int16)
    x = heads(2, 7, 3, 32, dtype)
    heads_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    tables = (rope.row_table, rope.column_table)
    opcheck(OPS.apply_rope.default, (heads_first, *tables, None, 1, interleaved, False))
    opcheck(OPS.apply_rope.default, (x[:, :4], *tables, kept, 1, interleaved, True))


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((0, 64), {}, "grid is 0; give the patches per side"),
        (((3, 4, 5), 64), {}, "grid is"),
        ((3, 30), {}, "head_dim is 30; rows and columns need a multiple of 4"),
        ((3, 32), {"theta": -1.0}, "theta -1.0"),
        ((3, 32), {"reference_grid": 0}, "reference_grid 0 must be positive"),
        ((3, 32), {"prefix_tokens": -1}, "prefix_tokens is -1"),
    ],
)
def test_constructor_says_what_is_allowed(arguments, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ek.Rope2d(*arguments, **options)


@pytest.mark.parametrize(
    ("shape", "head_dim", "positions", "error", "sentence"),
    [
        (
            (2, 15, 2, 32),
            32,
            None,
            ValueError,
            "15 tokens, but rope has 1 prefix tokens and a grid of 3 x 5, 16 in all",
        ),
        ((2, 16, 2, 64), 32, None, ValueError, "head dimension is 64, but rope was made for 32"),
        ((2, 16, 64), 64, None, ValueError, r"expected \(B, N, H, D\)"),
        ((2, 5, 2, 32), 32, torch.zeros(2, 5, dtype=torch.long), ValueError, r"expected \(2, 4\)"),
        ((2, 5, 2, 32), 32, torch.zeros(4, dtype=torch.long), ValueError, r"positions has shape \(4,\)"),
        ((2, 5, 2, 32), 32, torch.zeros(2, 4), TypeError, "positions has dtype torch.float32; patch ids"),
        ((2, 5, 2, 32), 32, torch.zeros(2, 4, dtype=torch.bool), TypeError, "positions has dtype torch.bool"),
        ((2, 0, 2, 32), 32, torch.zeros(2, 0, dtype=torch.long), ValueError, "fewer than the 1 prefix tokens"),
    ],
)
def test_rotation_says_what_does_not_fit(shape, head_dim, positions, error, sentence):
    with pytest.raises(error, match=sentence):
        ek.apply_rope(torch.zeros(shape), ek.Rope2d((3, 5), head_dim), positions)


def test_rotation_wants_a_rope():
    with pytest.raises(TypeError, match=r"rope is a Linear; expected an evakernels.Rope2d"):
        ek.apply_rope(heads(2, 16, 2, 32), nn.Linear(2, 2))
