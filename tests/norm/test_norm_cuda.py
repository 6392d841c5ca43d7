"""The compiled norm kernels: as exact as PyTorch, the same bits at every run, and inside their tensors."""

import numerics
import pytest
import torch
import torch.nn.functional as F
from shapes import ROW_LENGTHS

import evakernels as ek

PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
MIXED = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
FUNCTIONS = {
    "layer_norm": lambda a: ek.layer_norm(a["branch"], a["weight"], a["bias"]),
    "rms_norm": lambda a: ek.rms_norm(a["branch"], a["weight"]),
    **{
        f"{function.__name__}{'_rms' if rms else ''}": lambda a, function=function, rms=rms: function(
            *(a["residual"], a["branch"], a["weight"], None if rms else a["bias"]),
            eps=1e-6, rms=rms, layer_scale=a["layer_scale"], row_scale=a["row_scale"],
        )
        for function in (ek.add_norm, ek.norm_add)
        for rms in (False, True)
    },
}  # fmt: skip


def composed(name, a, rounded):
    """The same function by PyTorch's own norms; what is stored on the way takes the dtype `rounded`."""

    def norm(x):
        shape = a["weight"].shape
        if "rms" in name:
            return F.rms_norm(x, shape, a["weight"], 1e-6)
        return F.layer_norm(x, shape, a["weight"], a["bias"], 1e-6)

    def scaled(x):
        x = x if a["layer_scale"] is None else x * a["layer_scale"]
        return x if a["row_scale"] is None else x * a["row_scale"].to(x.dtype)[:, None, None]

    if name.startswith("add_norm"):
        total = (a["residual"] + scaled(a["branch"])).to(rounded).to(a["residual"].dtype)
        return total, norm(total)
    return a["residual"] + scaled(norm(a["branch"])) if name.startswith("norm_add") else norm(a["branch"])


def arguments(shape, wide, narrow, device, scales, weights=None):
    generator = torch.Generator().manual_seed(shape[-1])

    def draw(*shape, dtype):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        # Weights around 1: products of several normals would leave the maximum to one element.
        x = 1 + 0.3 * x if len(shape) == 1 else x + 0.3
        return x.to(device, dtype).requires_grad_()

    width, weights = shape[-1], weights or narrow
    return {
        "residual": draw(*shape, dtype=wide),
        "branch": draw(*shape, dtype=narrow),
        "weight": draw(width, dtype=weights),
        "bias": draw(width, dtype=weights),
        "layer_scale": draw(width, dtype=weights) if scales else None,
        "row_scale": torch.tensor([0.0, 1.25, 1.25], device=device)[: shape[0]] if scales else None,
    }


def results(function, a, like=None):
    """Outputs and gradients, for fixed gradients of the outputs, rounded to the dtypes of the outputs `like`."""
    outputs = function(a)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in a.values() if t is not None and t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    dys = [
        torch.randn(y.shape, generator=generator).to(z.dtype).to(y)
        for y, z in zip(outputs, like or outputs, strict=True)
    ]
    gradients = torch.autograd.grad(outputs, leaves, dys, allow_unused=True)
    return [y.detach() for y in outputs], list(gradients)


def assert_exact(name, a):
    wide, narrow = a["residual"].dtype, a["branch"].dtype

    def cast(dtype):
        return {k: t if t is None or k == "row_scale" else t.detach().to(dtype).requires_grad_() for k, t in a.items()}

    with torch.autocast(a["branch"].device.type, narrow, enabled=wide != narrow):
        actual = results(FUNCTIONS[name], a)
    # The sum of add_norm is an output and the input of the norm: rounded once. Else a pass rounds nothing between load
    # and store, like PyTorch's norm in float32.
    alone = name in ("layer_norm", "rms_norm")
    oracle = results(lambda x: composed(name, x, wide), cast(torch.float64), actual[0])
    peer = results(lambda x: composed(name, x, wide), cast(narrow if alone else torch.float32), actual[0])
    for factor, *triples in zip((numerics.OUTPUTS, numerics.GRADIENTS), actual, peer, oracle, strict=True):
        for place, (x, p, o) in enumerate(zip(*triples, strict=True)):
            assert (x is None) == (o is None)
            if x is not None:
                numerics.assert_as_exact_as(
                    x, p, o, factor, f"{name}, {'output' if factor == 2 else 'gradient'} {place}"
                )


@pytest.mark.parametrize("width", ROW_LENGTHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_as_exact_as_pytorch_at_every_row_length(name, width, kernels):
    assert_exact(name, arguments((3, 2, width), torch.bfloat16, torch.bfloat16, kernels, scales=False))


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize(("wide", "narrow"), [*PAIRS, *MIXED], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_as_exact_as_pytorch_in_every_dtype(name, wide, narrow, scales, kernels):
    for width in (9, 96, 770, 5126):
        assert_exact(name, arguments((3, 11, width), wide, narrow, kernels, scales))


@pytest.mark.parametrize("width", [1, 7, 8, 255, 256, 257, 1009, 5112, 5113, 5120, 5121])
@pytest.mark.parametrize("name", ["layer_norm", "add_norm"])
def test_edges_of_windows_warps_and_plans(name, width, kernels):
    assert_exact(name, arguments((3, 5, width), torch.float32, torch.float32, kernels, scales=True))


def test_weights_have_a_dtype_of_their_own(kernels):
    for weights in (torch.float32, torch.bfloat16):
        a = arguments((3, 5, 770), torch.float32, torch.bfloat16, kernels, scales=True, weights=weights)
        gradients = results(FUNCTIONS["add_norm"], a)[1]
        assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16, weights, weights, weights]
        assert_exact("norm_add", a)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_rows_repeat_bit_for_bit_in_every_thread_order(name, kernels, monkeypatch):
    a = arguments((3, 71, 262), torch.float32, torch.bfloat16, kernels, scales=True)
    seen = []
    for seed in range(4):
        monkeypatch.setenv("EMU_SEED", str(seed))
        outputs, gradients = results(FUNCTIONS[name], a)
        seen.append([*outputs, *(g for g in gradients if g is not None)])
    assert_exact(name, a)
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other, strict=True))


def test_strided_and_unaligned_inputs_are_copied(kernels):
    x = torch.randn(4, 6, 40, device=kernels)
    weight = torch.randn(33, device=kernels)[1:]
    for view in (x[..., :32], x.transpose(0, 1)[..., 8:], x[..., 1:33]):
        expected = F.layer_norm(view.double(), (32,), weight.double())
        torch.testing.assert_close(ek.layer_norm(view, weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_neighbours_in_memory_are_untouched(kernels):
    """Rows of 9 elements share their windows: what one row stores must not reach into the next."""
    for rows in (1, 2, 3, 300):
        x = torch.randn(rows, 9, device=kernels)
        whole = ek.layer_norm(x, torch.ones(9, device=kernels))
        alone = torch.stack([ek.layer_norm(row[None], torch.ones(9, device=kernels))[0] for row in x])
        torch.testing.assert_close(whole, alone, rtol=1e-6, atol=1e-6)


def test_no_rows(kernels):
    weight = torch.ones(8, device=kernels, requires_grad=True)
    y = ek.rms_norm(torch.empty(0, 3, 8, device=kernels), weight)
    y.sum().backward()
    assert y.shape == (0, 3, 8) and not weight.grad.any()


def test_refusals_name_the_reason(kernels):
    x = torch.randn(2, 8, device=kernels)
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels take float32, .* not torch\.float64"):
        ek.layer_norm(x.double(), x[0].double())
    with pytest.raises(NotImplementedError, match=r"cuda: its kernels compute torch\.float32 beside"):
        ek.norm_add(x.bfloat16(), x, x[0], eps=1e-6)
    with (
        torch.autocast(kernels.type, torch.bfloat16),
        pytest.raises(NotImplementedError, match=r"cuda: its kernels do not round a branch of torch\.float32"),
    ):
        ek.add_norm(x, x, x[0], eps=1e-6)
    long = torch.randn(1, 60000, device=kernels, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"cuda: its backward kernels take rows of up to \d+ elements"):
        ek.layer_norm(long, long[0].detach()).sum().backward()
