"""What the norm kernels are held against, and what CUDA's and Triton's alike must do."""

import numerics
import torch
import torch.nn.functional as F

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

    with torch.autocast(a["branch"].device.type, narrow, enabled=wide != narrow != torch.float32):
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


def assert_weights_keep_their_dtypes(device):
    for weights in (torch.float32, torch.bfloat16):
        a = arguments((3, 5, 770), torch.float32, torch.bfloat16, device, scales=True, weights=weights)
        gradients = results(FUNCTIONS["add_norm"], a)[1]
        assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16, weights, weights, weights]
        assert_exact("norm_add", a)


def assert_any_strides_are_served(device):
    x = torch.randn(4, 6, 40, device=device)
    weight = torch.randn(33, device=device)[1:]
    for view in (x[..., :32], x.transpose(0, 1)[..., 8:], x[..., 1:33]):
        expected = F.layer_norm(view.double(), (32,), weight.double(), eps=1e-6)
        torch.testing.assert_close(ek.layer_norm(view, weight).double(), expected, rtol=1e-5, atol=1e-5)


def assert_no_rows_are_served(device):
    weight = torch.ones(8, device=device, requires_grad=True)
    y = ek.rms_norm(torch.empty(0, 3, 8, device=device), weight)
    y.sum().backward()
    assert y.shape == (0, 3, 8) and not weight.grad.any()


def assert_repeats(name, a, between=lambda run: None, runs=4):
    """All runs have the same bits; before each, `between` is called with its number."""
    seen = []
    for run in range(runs):
        between(run)
        outputs, gradients = results(FUNCTIONS[name], a)
        seen.append([*outputs, *(g for g in gradients if g is not None)])
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other, strict=True))
