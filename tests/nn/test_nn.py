"""The modules: the field's keys, and the mathematics of PyTorch's, timm's and open_clip's own."""

import copy
from functools import partial

import pytest
import timm
import timm.layers
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from timm.models.eva import EvaAttention

import evakernels as ek

ROUNDING = {"rtol": 1e-11, "atol": 1e-11}  # of float64, where only the order of operations may differ


def normal(*shape, seed=0, grad=True):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_(grad)


def scrambled(module):
    """The module in float64 with every parameter random: no weight of one or bias of zero hides an error."""
    module = module.double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + 100) / parameter.shape[-1] ** 0.5 + 0.1)
    return module


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def assert_same(ours, peer, x, renamed=lambda name: name, positions=(), peer_arguments=None):
    """Same output and same gradients, of the input and of every parameter that has the peer's (renamed) key."""
    y, expected = ours(x, *positions), peer(x, **(peer_arguments or {}))
    torch.testing.assert_close(y, expected, **ROUNDING)
    dy = normal(*y.shape, seed=9, grad=False)

    def gradients(module, out):
        leaves = {"x": x, **dict(module.named_parameters())}
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dy), strict=True))

    found, wanted = gradients(ours, y), gradients(peer, expected)
    assert {renamed(name) for name in found} == set(wanted)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[renamed(name)], **ROUNDING, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_is_pytorchs(bias):
    ours, peer = scrambled(ek.nn.LayerNorm(12, bias=bias)), torch.nn.LayerNorm(12, eps=1e-6, bias=bias).double()
    peer.load_state_dict(ours.state_dict())
    assert_same(ours, peer, normal(2, 3, 12))
    assert isinstance(ours, torch.nn.LayerNorm) and ours.eps == 1e-6


def test_rms_norm_is_pytorchs():
    ours, peer = scrambled(ek.nn.RMSNorm(12, eps=1e-5)), torch.nn.RMSNorm(12, eps=1e-5).double()
    peer.load_state_dict(ours.state_dict())
    assert_same(ours, peer, normal(2, 3, 12))
    assert ek.nn.RMSNorm(12).eps == 1e-6


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("hidden", [16, 21])
def test_swiglu_is_timms_under_evas_keys(hidden, norm):
    ours = scrambled(ek.nn.SwiGLU(12, hidden, 10, norm=norm, eps=1e-5))
    linear = {f"w{n}.bias": (hidden,) for n in (1, 2)} | {f"w{n}.weight": (hidden, 12) for n in (1, 2)}
    linear |= {"w3.weight": (10, hidden), "w3.bias": (10,)}
    assert shapes(ours) == linear | ({"ffn_ln.weight": (hidden,), "ffn_ln.bias": (hidden,)} if norm else {})
    names = {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2", "ffn_ln": "norm"}

    def renamed(name):
        first, _, rest = name.partition(".")
        return f"{names.get(first, first)}.{rest}" if rest else name

    norm_layer = partial(torch.nn.LayerNorm, eps=1e-5) if norm else None
    peer = timm.layers.SwiGLU(12, hidden, 10, norm_layer=norm_layer).double()
    peer.load_state_dict({renamed(name): tensor for name, tensor in ours.state_dict().items()})
    assert_same(ours, peer, normal(2, 3, 12), renamed)
    assert ek.nn.SwiGLU(12, 16).w3.out_features == 12


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inner_norm", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_attention_is_timms_under_evas_keys(fused, bias, inner_norm, rotated):
    rope = ek.Rope2d((2, 3), 32) if rotated else None
    ours = ek.nn.Attention(64, 2, qkv_fused=fused, qkv_bias=bias, inner_norm=inner_norm, rope=rope, eps=1e-5)
    weights = {"qkv.weight": (192, 64)} if fused else {f"{n}_proj.weight": (64, 64) for n in "qkv"}
    weights |= {"q_bias": (64,), "v_bias": (64,)} if bias else {}
    weights |= {"inner_attn_ln.weight": (64,), "inner_attn_ln.bias": (64,)} if inner_norm else {}
    assert shapes(ours) == weights | {"proj.weight": (64, 64), "proj.bias": (64,)}

    def renamed(name):
        if not fused:
            name = {"q_bias": "q_proj.bias", "v_bias": "v_proj.bias"}.get(name, name)
        return name.replace("inner_attn_ln", "norm")

    norm_layer = partial(torch.nn.LayerNorm, eps=1e-5) if inner_norm else None
    peer = EvaAttention(64, 2, qkv_bias=bias, qkv_fused=fused, norm_layer=norm_layer, scale_norm=inner_norm).double()
    ours = scrambled(ours)
    peer.load_state_dict({renamed(name): tensor for name, tensor in ours.state_dict().items()})
    if not rotated:
        return assert_same(ours, peer, normal(2, 7, 64), renamed)
    # timm's table: the sines, then the cosines, of each token, each twice for the two channels of a pair.
    kept = torch.tensor([[5, 0, 2], [1, 3, 4]])
    angles = torch.cat([rope.row_table[kept // 3], rope.column_table[kept % 3]], 2).double().repeat_interleave(2, 2)
    table = torch.cat([angles[..., 1], angles[..., 0]], -1)[:, None]
    assert_same(ours, peer, normal(2, 4, 64), renamed, [kept], {"rope": table})


def test_causal_attention_does_not_look_ahead():
    module = scrambled(ek.nn.Attention(64, 2, qkv_fused=True, qkv_bias=True, inner_norm=False, causal=True))
    x = normal(1, 5, 64, grad=False)
    torch.testing.assert_close(module(x)[:, :3], module(x[:, :3]), **ROUNDING)


def test_one_rope_may_serve_every_block_and_has_no_keys():
    rope = ek.Rope2d(2, 32)
    blocks = torch.nn.ModuleList(
        ek.nn.Attention(32, 1, qkv_fused=False, qkv_bias=True, inner_norm=True, rope=rope) for _ in range(2)
    )
    assert blocks[0].rope is blocks[1].rope and not any("rope" in key for key in blocks.state_dict())
    assert copy.deepcopy(blocks)[0].rope is not rope


@pytest.mark.parametrize(("rate", "keep"), [(0.5, 3), (0.4, 3), (0.3, 4), (0.99, 1)])
def test_token_drop_keeps_the_drawn_patches_in_training_and_everything_in_eval(rate, keep):
    drop, x = ek.nn.TokenDrop(rate, prefix_tokens=2), normal(3, 8, 4)
    y, kept = drop(x, seed=1, offset=7)
    assert torch.equal(kept, ek.sample_kept_tokens(3, 6, keep, seed=1, offset=7))
    assert torch.equal(y, ek.gather_tokens(x, kept, prefix_tokens=2))
    for module in (drop.eval(), ek.nn.TokenDrop(0.0)):
        y, kept = module(x, seed=1, offset=7)
        assert y is x and kept is None
    assert not drop.state_dict()


@pytest.mark.parametrize("bias", [None, -10.0])
def test_clip_loss_is_open_clips(bias):
    leaves = normal(7, 5), normal(7, 5, seed=1), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    features = *(F.normalize(x, dim=-1) for x in leaves[:2]), leaves[2]
    losses = [loss(*features, bias) for loss in (ek.nn.ClipLoss(), ClipLoss())]
    torch.testing.assert_close(*losses, **ROUNDING)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
    torch.testing.assert_close(*gradients, **ROUNDING)
    # Positions and names of open_clip's constructor, and its other way to return.
    ours = ek.nn.ClipLoss(True, True, cache_labels=True, rank=0, world_size=1, use_horovod=False)
    assert list(ours(*features, output_dict=True)) == ["contrastive_loss"]
    assert torch.equal(ours(*features, output_dict=True)["contrastive_loss"], losses[0])


@pytest.mark.parametrize("bias", [None, -10.0])
def test_siglip_loss_is_open_clips(bias):
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    biases = [] if bias is None else [torch.tensor(bias, dtype=torch.float64, requires_grad=True)]
    leaves = normal(7, 5), normal(7, 5, seed=1), scale, *biases
    arguments = *(F.normalize(x, dim=-1) for x in leaves[:2]), scale, *(biases or [None])
    ours = ek.nn.SigLipLoss(True, rank=0, world_size=1, dist_impl="gather")
    losses = [loss(*arguments) for loss in (ours, SigLipLoss())]
    torch.testing.assert_close(*losses, **ROUNDING)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
    torch.testing.assert_close(*gradients, **ROUNDING)
    assert torch.equal(ours(*arguments, output_dict=True)["contrastive_loss"], losses[0])


def test_clip_loss_gives_a_bias_the_gradient_0():
    """DDP waits for the gradient of every parameter."""
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    ek.nn.ClipLoss()(normal(7, 5), normal(7, 5, seed=1), 3.0, bias).backward()
    assert bias.grad == 0


def test_norms_are_what_timm_and_pytorch_make_of_a_class():
    for norm in (ek.nn.LayerNorm, ek.nn.RMSNorm):
        made = norm((8,), elementwise_affine=True, device="cpu", dtype=torch.bfloat16)
        assert made.weight.dtype == torch.bfloat16
        plain = norm(8, elementwise_affine=False)
        x = torch.randn(3, 8)
        assert torch.equal(plain(x), norm.__base__(8, eps=1e-6, elementwise_affine=False)(x))
        with pytest.raises(ValueError, match=r"normalized_shape is \(4, 8\)"):
            norm((4, 8))
    x = torch.randn(3, 8)
    torch.testing.assert_close(ek.nn.RMSNorm(8, eps=None)(x), torch.nn.RMSNorm(8)(x))
    model = timm.create_model("vit_tiny_patch16_224", depth=1, norm_layer=ek.nn.LayerNorm)
    assert type(model.blocks[0].norm1) is ek.nn.LayerNorm


class Adapted(torch.nn.Module):
    """A layer in the place of a linear one that has its weight and does more, as adapters have."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.extra = layer, torch.nn.Linear(layer.in_features, layer.out_features).double()
        self.weight, self.bias, self.out_features = layer.weight, layer.bias, layer.out_features

    def forward(self, x):
        return self.layer(x) + self.extra(x)


def double(module, inputs, output):
    return 2 * output


@pytest.mark.parametrize("part", ["w1", "w2", "w3", "ffn_ln"])
def test_swiglu_calls_what_was_hooked_or_exchanged(part):
    ours, x = scrambled(ek.nn.SwiGLU(12, 11)), normal(3, 12)

    def by_hand():
        return ours.w3(ours.ffn_ln(F.silu(ours.w1(x)) * ours.w2(x)))

    torch.testing.assert_close(ours(x), by_hand(), **ROUNDING)
    handle = getattr(ours, part).register_forward_hook(double)
    torch.testing.assert_close(ours(x), by_hand(), **ROUNDING)
    handle.remove()
    if part != "ffn_ln":
        setattr(ours, part, Adapted(getattr(ours, part)))
        torch.testing.assert_close(ours(x), by_hand(), **ROUNDING)


@pytest.mark.parametrize(("fused", "part"), [(True, "qkv"), (False, "q_proj"), (False, "v_proj")])
def test_attention_calls_what_was_hooked_or_exchanged(fused, part):
    ours, x = scrambled(ek.nn.Attention(64, 2, qkv_fused=fused, qkv_bias=True, inner_norm=False)), normal(2, 5, 64)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        getattr(twin, part).weight.mul_(2)
    getattr(ours, part).register_forward_hook(double)
    torch.testing.assert_close(ours(x), twin(x), **ROUNDING)
    setattr(twin, part, Adapted(getattr(twin, part)))
    with torch.no_grad():
        getattr(twin, part).extra.weight.zero_()
        getattr(twin, part).extra.bias.zero_()
    torch.testing.assert_close(ours(x), twin(x), **ROUNDING)
    with torch.no_grad():
        getattr(twin, part).extra.weight.fill_(1)
    assert not torch.allclose(ours(x), twin(x))


@pytest.mark.parametrize("bare", ["w1", "w2", "w3"])
def test_swiglu_takes_layers_with_a_bias_and_without(bare):
    ours, x = scrambled(ek.nn.SwiGLU(12, 11)), normal(3, 12)
    getattr(ours, bare).bias = None
    torch.testing.assert_close(ours(x), ours.w3(ours.ffn_ln(F.silu(ours.w1(x)) * ours.w2(x))), **ROUNDING)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("parts", [("qkv",), ("q_proj",), ("k_proj", "v_proj")])
def test_attention_adds_the_biases_of_exchanged_projections(parts, own):
    """As it does where hooks make it call them."""
    fused = parts == ("qkv",)
    ours, x = scrambled(ek.nn.Attention(64, 2, qkv_fused=fused, qkv_bias=own, inner_norm=False)), normal(2, 5, 64)
    for part in parts:
        setattr(ours, part, scrambled(torch.nn.Linear(64, 192 if fused else 64)))
    called = copy.deepcopy(ours)
    getattr(called, parts[0]).register_forward_hook(lambda module, inputs, output: None)
    torch.testing.assert_close(ours(x), called(x), **ROUNDING)


@pytest.mark.parametrize("recorded", [False, True])
def test_derivatives_by_torch_func_are_refused_not_zero(recorded):
    x, w, func = torch.randn(3, 8), torch.ones(8), torch.func
    calls = (
        lambda f: func.jvp(f, (x,), (x,)),
        lambda f: func.jvp(func.vmap(f), (x,), (x,)),
        lambda f: func.jacfwd(f)(x),
        lambda f: func.vjp(f, x),
        lambda f: func.vmap(func.grad(lambda row: f(row).sum()))(x),
    )
    with torch.set_grad_enabled(recorded):
        for call in calls:
            for f in (lambda x: ek.layer_norm(x, w), lambda x: ek.swiglu(x, x)):
                with pytest.raises(NotImplementedError, match=r"torch\.func's grad"):
                    call(f)
        torch.testing.assert_close(func.vmap(lambda row: ek.layer_norm(row, w))(x), ek.layer_norm(x, w))


class Block(torch.nn.Module):
    """Everything in the order in which a tower uses it."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm1, self.norm2 = ek.nn.TokenDrop(0.5), ek.nn.LayerNorm(32), ek.nn.RMSNorm(32)
        rope = ek.Rope2d(2, 32)
        self.attn = ek.nn.Attention(32, 1, qkv_fused=False, qkv_bias=True, inner_norm=True, rope=rope)
        self.mlp, self.loss = ek.nn.SwiGLU(32, 21), ek.nn.ClipLoss()

    def forward(self, x, offset):
        x, kept = self.drop(x, seed=3, offset=offset)
        x = x + self.attn(self.norm1(x), kept)
        x = x + self.mlp(self.norm2(x))
        return self.loss(F.normalize(x[:, 0], dim=-1), F.normalize(x[:, 1], dim=-1), 10.0)


def test_compiled_equals_eager_forward_and_backward():
    block, x, offset = scrambled(Block()), normal(4, 5, 32), torch.tensor([12])
    inputs = [x, *block.parameters()]
    eager = block(x, offset)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x, offset)
    torch.testing.assert_close(compiled, eager, **ROUNDING)
    gradients = [torch.autograd.grad(loss, inputs) for loss in (compiled, eager)]
    torch.testing.assert_close(*gradients, **ROUNDING)


def test_autocast_runs_the_products_in_half_precision_and_keeps_float32_parameters():
    block, x = Block(), normal(4, 5, 32).detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = block.mlp(block.norm1(x))
        assert hidden.dtype == block.attn(block.norm2(x)).dtype == torch.bfloat16
        block(x, 0).backward()
    assert {p.grad.dtype for p in block.parameters()} == {torch.float32}
    torch.testing.assert_close(hidden.float(), block.mlp(block.norm1(x)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ek.nn.LayerNorm((3, 4)), ValueError, r"normalized_shape is \(3, 4\); only the last dimension"),
        (
            lambda: ek.nn.Attention(65, 2, qkv_fused=True, qkv_bias=True, inner_norm=False),
            ValueError,
            "dim is 65 and num_heads 2",
        ),
        (lambda: ek.nn.TokenDrop(1.0), ValueError, "rate is 1.0; allowed is 0 <= rate < 1"),
        (
            lambda: ek.nn.SigLipLoss(world_size=2)(normal(3, 4), normal(3, 4), 1.0),
            ValueError,
            "nn.SigLipLoss: world_size is 2, but of",
        ),
        (lambda: ek.nn.ClipLoss(use_horovod=True), ValueError, "use_horovod is True; it must be False"),
        (
            lambda: ek.nn.ClipLoss(world_size=2)(normal(3, 4), normal(3, 4), 1.0),
            ValueError,
            "world_size is 2, but of torch.distributed's default group it is not initialised",
        ),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()
