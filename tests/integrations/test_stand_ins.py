"""The stand-ins: importable only where asked for, the same numbers, and words for what they do not cover."""

import copy
import importlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from numerics import GRADIENTS, OUTPUTS, assert_as_exact_as

from evakernels.integrations import stand_ins

MODULES = [module for covered in stand_ins.COVERED.values() for module in covered]
# Three steps on one tensor: DeepSpeed's rule and NVIDIA's, worked out by hand in float64.
START = [0.5, -1.0, 2.0, 0.25]
GRADS = [[0.1, -0.2, 0.3, 0.4], [0.2, 0.1, -0.3, 0.05], [-0.1, 0.4, 0.2, 0.0]]
DEEPSPEED = {
    0.05: [0.45617021078176845, -0.9869441592839566, 1.97438546391342, 0.206831515831025],
    0.0: [0.4558077431386425, -0.9890436079244882, 1.9792912928617756, 0.20572433007581192],
}
NVIDIA = {
    0.05: [0.4602377142994981, -0.9929552359111662, 1.9787136404456347, 0.210211710939093],
    0.0: [0.4761750062147039, -0.9918772895559042, 1.9881635464619456, 0.22648300456199594],
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def installed():
    stands = stand_ins.install("xformers", "apex", "deepspeed")
    if stands.skipped:
        stands.undo()
        pytest.skip(str(stands))
    yield stands
    stands.undo()


def after_three_steps(optimizer, **options):
    p = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    made = optimizer([p], lr=1e-2, betas=(0.9, 0.98), eps=1e-6, **options)
    for grad in GRADS:
        p.grad = torch.tensor(grad, dtype=torch.float64)
        made.step()
        made.zero_grad()
        assert p.grad is None
    return p.tolist()


def test_nothing_is_importable_until_installed_nor_after_undo():
    assert not any(isinstance(sys.modules.get(name), stand_ins._StandIn) for name in MODULES)
    stands = stand_ins.install("xformers")
    if stands.skipped:
        pytest.skip(str(stands))
    assert stands.installed == ["xformers"] and str(stands) == "stand-in for xformers"
    import xformers.ops as xops

    assert xops.memory_efficient_attention is stand_ins.memory_efficient_attention
    assert stand_ins.install("xformers").skipped == {"xformers": "it already has one"}
    stands.undo()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("xformers.ops")
    stands.undo()  # the second time there is nothing left to do


def test_all_that_is_covered_can_be_imported_as_its_users_do(installed):
    for covered in stand_ins.COVERED.values():
        for module, names in covered.items():
            for name, value in names.items():
                assert getattr(importlib.import_module(module), name) is value
    assert importlib.util.find_spec("apex") is not None


def test_a_package_that_can_be_imported_is_left_alone(monkeypatch):
    real = {name: types.ModuleType(name) for name in ("xformers", "xformers.ops")}
    for name in stand_ins.COVERED["xformers"]["xformers.ops"]:
        setattr(real["xformers.ops"], name, object())
    for name, module in real.items():
        monkeypatch.setitem(sys.modules, name, module)
    stands = stand_ins.install("xformers")
    assert stands.skipped == {"xformers": "it can be imported itself"} and not stands.installed
    assert sys.modules["xformers.ops"] is real["xformers.ops"]
    assert str(stands) == "no stand-in for xformers: it can be imported itself"


def test_a_package_that_lacks_what_is_covered_is_stood_in_for_and_comes_back(monkeypatch):
    broken = types.ModuleType("xformers")  # its parent imports, `ops` does not
    monkeypatch.setitem(sys.modules, "xformers", broken)
    stands = stand_ins.install("xformers")
    assert stands.installed == ["xformers"] and sys.modules["xformers"] is not broken
    stands.undo()
    assert sys.modules["xformers"] is broken and "xformers.ops" not in sys.modules


def test_what_is_not_covered_is_named_with_what_is(installed):
    import apex

    with pytest.raises(AttributeError, match=r"stand-in and has no 'amp'; it covers apex\.normalization: FusedLayer"):
        apex.amp  # noqa: B018
    with pytest.raises(ImportError, match=r"cannot import name 'amp' from 'apex' \(.*stand_ins\.py\)"):
        from apex import amp  # noqa: F401
    with pytest.raises(ImportError):
        importlib.import_module("apex.normalization.fused_layer_norm")
    assert not hasattr(sys.modules["xformers.ops"], "SwiGLU")


def test_install_names_what_there_is():
    with pytest.raises(ValueError, match=r"\('flash_attn',\) was given; allowed are any of xformers, apex, deepspeed"):
        stand_ins.install("flash_attn")
    with pytest.raises(ValueError, match="allowed are any of"):
        stand_ins.install()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [None, 2])
def test_attention_is_that_of_pytorch(causal, heads):
    shape = (2, 7, 32) if heads is None else (2, 7, heads, 32)
    q, k, v, dy = (normal(*shape, seed=seed) for seed in range(4))

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        y = function(*leaves)
        return y, torch.autograd.grad(y, leaves, dy.to(dtype))

    def sdpa(q, k, v):
        if heads is not None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
        return y if heads is None else y.transpose(1, 2)

    def ours(q, k, v):
        bias = stand_ins.LowerTriangularMask() if causal else None
        return stand_ins.memory_efficient_attention(q, k, v, attn_bias=bias, p=0.0, scale=0.3)

    y, gradients = run(ours, torch.float32)
    peer, peers = run(sdpa, torch.float32)
    oracle, oracles = run(sdpa, torch.float64)
    assert_as_exact_as(y, peer, oracle, OUTPUTS)
    for mine, theirs, exact in zip(gradients, peers, oracles, strict=True):
        assert_as_exact_as(mine, theirs, exact, GRADIENTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_bias": torch.zeros(7, 7)}, r"attn_bias is a tensor of shape \(7, 7\); the stand-in covers attn_bias"),
        ({"attn_bias": object()}, "attn_bias is a object"),
        ({"p": 0.1}, "p is 0.1 and op None"),
        ({"op": "cutlass"}, "op cutlass"),
        ({"key": torch.zeros(1, 8, 1, 32)}, r"have shapes \(1, 7, 1, 32\), \(1, 8, 1, 32\), \(1, 7, 1, 32\)"),
    ],
)
def test_attention_refuses_what_would_change_its_result(options, words):
    arguments = dict.fromkeys(("query", "key", "value"), torch.zeros(1, 7, 1, 32))
    with pytest.raises(NotImplementedError, match=words):
        stand_ins.memory_efficient_attention(**(arguments | options))


def test_attention_refuses_five_dimensions():
    with pytest.raises(NotImplementedError, match=r"shape \(1, 2, 2, 1, 32\); the stand-in covers \(B, N, H, D\)"):
        stand_ins.memory_efficient_attention(*[torch.zeros(1, 2, 2, 1, 32)] * 3)


def test_attention_gives_the_dtype_asked_for():
    x = normal(1, 3, 1, 32).bfloat16()
    assert stand_ins.memory_efficient_attention(x, x, x, output_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("ours", "peer"), [(stand_ins.FusedLayerNorm, torch.nn.LayerNorm), (stand_ins.FusedRMSNorm, torch.nn.RMSNorm)]
)
def test_norms_are_those_of_pytorch_with_their_keys(ours, peer, affine):
    norm, theirs = ours(12, eps=1e-3, elementwise_affine=affine), peer((12,), eps=1e-3, elementwise_affine=affine)
    values = {key: normal(12, seed=i + 1) for i, key in enumerate(theirs.state_dict())}
    assert norm.state_dict().keys() == theirs.state_dict().keys()
    for key, value in norm.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])  # weights of one, biases of zero
    norm.double().load_state_dict(values)
    theirs.double().load_state_dict(values)
    x = normal(2, 3, 12)
    torch.testing.assert_close(norm(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert ours(12).eps == 1e-5


@pytest.mark.parametrize("norm", [stand_ins.FusedLayerNorm, stand_ins.FusedRMSNorm])
def test_norms_take_autocasts_dtype_and_else_that_of_the_input(norm):
    module = norm(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.ones(2, 12)).dtype == torch.bfloat16
    assert module(torch.ones(2, 12)).dtype == torch.float32


def test_norms_refuse_more_than_the_last_dimension():
    assert stand_ins.FusedLayerNorm([12]).normalized_shape == (12,)
    with pytest.raises(NotImplementedError, match=r"FusedRMSNorm: normalized_shape is \(3, 12\); the stand-in covers"):
        stand_ins.FusedRMSNorm((3, 12))


@pytest.mark.parametrize("decay", [0.05, 0.0])
def test_deepspeeds_lamb_is_the_rule_that_trained_the_published_weights(decay):
    found = after_three_steps(stand_ins.FusedLamb, weight_decay=decay)
    torch.testing.assert_close(found, DEEPSPEED[decay], rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", [0.05, 0.0])
def test_apexs_lamb_is_nvidias_rule(decay):
    found = after_three_steps(stand_ins.FusedLAMB, weight_decay=decay)
    torch.testing.assert_close(found, NVIDIA[decay], rtol=1e-12, atol=0)


def test_apexs_lamb_clips_by_default_and_adapts_excluded_groups_when_told():
    clipped = after_three_steps(stand_ins.FusedLAMB, max_grad_norm=0.1)
    assert clipped != after_three_steps(stand_ins.FusedLAMB) == after_three_steps(stand_ins.FusedLAMB, max_grad_norm=1)
    assert after_three_steps(stand_ins.FusedLAMB, weight_decay=0.0, use_nvlamb=True) != NVIDIA[0.0]
    options = stand_ins.FusedLAMB([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    assert (options["betas"], options["eps"], options["weight_decay"]) == ((0.9, 0.999), 1e-6, 0.01)


def test_deepspeeds_lamb_has_deepspeeds_defaults():
    options = stand_ins.FusedLamb([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    assert (options["betas"], options["eps"], options["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)
    assert options["trust_ratio_bounds"] == (0.01, 10.0) and options["adapt_excluded"]


def test_bias_correction_may_be_left_out():
    for optimizer in (stand_ins.FusedLAMB, stand_ins.FusedLamb):
        assert optimizer([torch.nn.Parameter(torch.ones(1))], bias_correction=False).bias_correction is None


def test_apexs_zero_grad_keeps_zeros_when_told():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    stand_ins.FusedLAMB([p], set_grad_none=False).zero_grad()
    assert p.grad is not None and not p.grad.any()
    copied = copy.deepcopy(stand_ins.FusedLAMB([p], set_grad_none=False))
    (q,) = copied.param_groups[0]["params"]
    q.grad = torch.ones(2)
    copied.zero_grad()
    assert q.grad is not None and not q.grad.any()


@pytest.mark.parametrize(
    ("optimizer", "options", "words"),
    [
        ("FusedLAMB", {"adam_w_mode": False}, "adam_w_mode False .* covers False, True and True"),
        ("FusedLAMB", {"grad_averaging": False}, "grad_averaging False"),
        ("FusedLAMB", {"amsgrad": True}, "amsgrad is True"),
        ("FusedLamb", {"eps_inside_sqrt": True}, "eps_inside_sqrt is True"),
        ("FusedLamb", {"amsgrad": True}, "amsgrad True"),
        ("FusedLamb", {"max_grad_norm": 1.0}, r"max_grad_norm 1.0; .*clip_grad_norm_ before step"),
    ],
)
def test_optimizers_refuse_what_would_change_the_step(optimizer, options, words):
    with pytest.raises(NotImplementedError, match=words):
        getattr(stand_ins, optimizer)([torch.nn.Parameter(torch.ones(2))], **options)


def test_optimizers_refuse_options_of_a_group_that_would_be_ignored():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(NotImplementedError, match="a group has max_coeff of its own"):
        stand_ins.FusedLamb([{"params": [p], "max_coeff": 1.0}])
    with pytest.raises(NotImplementedError, match="a group has grad_averaging of its own"):
        stand_ins.FusedLAMB([{"params": [p], "grad_averaging": False}])


def test_deepspeeds_lamb_refuses_what_its_engine_would_pass():
    optimizer = stand_ins.FusedLamb([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(NotImplementedError, match="grads, output_params, scale or grad_norms"):
        optimizer.step(scale=2.0)
    with pytest.raises(NotImplementedError, match="get_lamb_coeffs"):
        optimizer.get_lamb_coeffs()
