"""One LAMB step: both published rules, trust ratios per tensor, group and slice, on both implementations."""

import copy
import math

import numerics
import pytest
import torch
from lamb.by_hand import PLAIN, RULES, assert_equal_to, by_hand, by_hand_ratios, random
from torch.library import opcheck

import evakernels as ek
from evakernels.ops.lamb import cpu

SHAPES = ((5, 3), (7,), (), (2, 3, 2), (0,), (11,))
IMPLEMENTATIONS = ("reference", "cpu")

# The published optimizers on four numbers, three steps, lr 1e-2, betas (.9, .98), eps 1e-6.
START = (0.5, -1.0, 2.0, 0.25)
GRADIENTS = ((0.1, -0.2, 0.3, 0.4), (0.2, 0.1, -0.3, 0.05), (-0.1, 0.4, 0.2, 0.0))
PUBLISHED = [
    ("update", 0.05, (0.4602377142994981, -0.9929552359111662, 1.9787136404456347, 0.210211710939093)),
    ("update", 0.0, (0.4761750062147039, -0.9918772895559042, 1.9881635464619456, 0.22648300456199594)),
    ("step_size", 0.05, (0.45617021078176845, -0.9869441592839566, 1.97438546391342, 0.206831515831025)),
    ("step_size", 0.0, (0.4558077431386425, -0.9890436079244882, 1.9792912928617756, 0.20572433007581192)),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with ek.using(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def small_pieces(request, monkeypatch):
    """Cut even small tensors, let some ratios wait and others compute their update twice, join pieces or not."""
    monkeypatch.setattr(cpu, "PIECE", 8)
    monkeypatch.setattr(cpu, "SMALL", 6)
    monkeypatch.setattr(cpu, "KEPT", 12)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def model(dtype=torch.float64, scale=1.0):
    """Two groups of parameters, with decay and without, and the gradients of three steps."""
    params = [torch.nn.Parameter(random(*s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)]
    groups = [{"params": params[:4], "weight_decay": 0.05}, {"params": params[4:], "weight_decay": 0.0}]
    grads = [[(scale * random(*s, seed=100 * t + i)).to(dtype) for i, s in enumerate(SHAPES)] for t in range(1, 4)]
    return params, groups, grads


def run(params, optimizer, grads):
    for of_step in grads:
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(("rule", "weight_decay", "expected"), PUBLISHED)
def test_published_optimizers(implementation, rule, weight_decay, expected):
    p = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = ek.FusedLAMB([p], lr=1e-2, weight_decay=weight_decay, **RULES[rule])
    run([p], optimizer, [[torch.tensor(g, dtype=torch.float64)] for g in GRADIENTS])
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("trust", ["parameter", "group", ("shard", 1), ("shard", 2), ("shard", 4)], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e3])
def test_three_steps_are_what_a_calculation_by_hand_gives(implementation, small_pieces, rule, trust, max_grad_norm):
    params, groups, grads = model()
    options = RULES[rule] | {"trust": trust, "max_grad_norm": max_grad_norm, "lr": 0.02}
    expected = by_hand(groups, grads, **options)
    assert_equal_to(run(params, ek.FusedLAMB(groups, **options), grads), expected)


@pytest.mark.parametrize("trust", ["parameter", "group", ("shard", 2), ("shard", 64)], ids=str)
@pytest.mark.parametrize("bounds", [None, (0.5, 1.5)])
def test_the_range_of_trust_ratios_is_that_of_a_calculation_by_hand(implementation, small_pieces, trust, bounds):
    """Of what has a ratio: empty tensors, empty slices, a tensor of zeros and groups without decay have none."""
    params, groups, grads = model()
    for p in params:  # without bounds all ratios are far above 1, which is what stands for none
        p.data.mul_(1 if bounds else 20)
    params[1].data.zero_()
    optimizer = ek.FusedLAMB(groups, lr=0.02, trust=trust, trust_ratio_bounds=bounds)
    assert optimizer.trust_ratios is None
    before = [p.detach().clone() for p in groups[0]["params"]]
    run(params, optimizer, grads[:1])
    us = []
    for p, old in zip(groups[0]["params"], before, strict=True):
        state = optimizer.state[p]
        m, v = state["exp_avg"] / (1 - 0.9), state["exp_avg_sq"] / (1 - 0.98)
        us.append((m / (v.sqrt() + 1e-6) + 0.05 * old).flatten().tolist())
    old = [p.flatten().tolist() for p in before]
    of_elements = by_hand_ratios(old, us, trust, bounds)
    if trust == "parameter":
        of_elements[1] = []
    if trust == ("shard", 64):  # one element each
        of_elements = [[r for r, x in zip(a, b, strict=True) if x] for a, b in zip(of_elements, old, strict=True)]
    flat = [ratio for tensor in of_elements for ratio in tensor]
    assert optimizer.trust_ratios.tolist() == pytest.approx([min(flat), max(flat)])


def test_there_is_no_range_without_a_ratio_or_a_step(implementation):
    p = torch.nn.Parameter(torch.ones(3))
    plain = ek.FusedLAMB([p], weight_decay=0.0)
    run([p], plain, [[torch.ones(3)]])
    assert plain.trust_ratios.tolist() == [0, 0]
    optimizer = ek.FusedLAMB([p], weight_decay=0.1)
    run([p], optimizer, [[torch.ones(3)]])
    assert optimizer.trust_ratios.min() > 0
    optimizer.found_inf = torch.ones(())
    run([p], optimizer, [[torch.ones(3)]])
    assert optimizer.trust_ratios.tolist() == [0, 0]


def test_slices_cut_through_tensors(implementation):
    """Nine elements in four slices of three, the last one padded: the second slice takes from both tensors."""
    params = [torch.nn.Parameter(random(4, seed=1)), torch.nn.Parameter(random(5, seed=2))]
    groups = [{"params": params, "weight_decay": 0.1}]
    grads = [[random(4, seed=3), random(5, seed=4)]]
    expected = by_hand(groups, grads, trust=("shard", 4), lr=0.1)
    assert_equal_to(run(params, ek.FusedLAMB(groups, lr=0.1, trust=("shard", 4)), grads), expected)


def test_bounds_hold_the_ratio(implementation):
    for start, ratio in ((1e-6, 0.01), (1e6, 10.0)):
        p = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
        options = PLAIN | {"trust_ratio_bounds": (0.01, 10), "weight_decay": 0.0}
        run([p], ek.FusedLAMB([p], lr=1.0, eps=1e-12, **options), [[p.new_ones(1)]])
        update = 0.1 / (math.sqrt(0.02) + 1e-12)
        assert start - p.item() == pytest.approx(ratio * update, rel=1e-9)


def test_ratio_is_one_where_a_norm_is_zero(implementation):
    for weight, grad, change in ((0.0, 2.0, 1.0), (3.0, 0.0, 0.0)):
        p = torch.nn.Parameter(torch.tensor([weight], dtype=torch.float64))
        run([p], ek.FusedLAMB([p], lr=0.5, weight_decay=0.0, adapt_excluded=True), [[p.new_tensor([grad])]])
        assert weight - p.item() == pytest.approx(0.5 * change, abs=1e-6)


def test_a_parameter_that_joins_later_is_corrected_for_its_own_steps(implementation):
    for rule in RULES.values():
        early, late, alone = (torch.nn.Parameter(random(6, seed=1)) for _ in range(3))
        together = ek.FusedLAMB([early, late], lr=0.1, **rule)
        g = [random(6, seed=2), random(6, seed=3)]
        early.grad = g[0]
        together.step()
        assert together.state[late] == {}
        run([early, late], together, [[g[1], g[0]]])
        run([alone], ek.FusedLAMB([alone], lr=0.1, **rule), [[g[0]]])
        torch.testing.assert_close(late, alone, rtol=1e-14, atol=0)


def test_update_is_exact_to_a_few_units_in_the_last_place():
    """From p = 0 a step of rate 1 leaves -u; all signs agree, so that nothing cancels."""
    n, (beta1, beta2), eps = 100_003, (0.9, 0.98), 1e-6
    for bias_correction in ("update", None):
        p = torch.nn.Parameter(torch.zeros(n))
        p.grad, m, v = (random(n, seed=s, dtype=torch.float32).abs() * 1e-3 for s in (1, 2, 3))
        v.mul_(1e-3)
        optimizer = ek.FusedLAMB([p], lr=1.0, adapt_excluded=True, bias_correction=bias_correction)
        optimizer.state[p] = {"step": torch.tensor(2.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        optimizer.step()
        m = beta1 * m.double() + (1 - beta1) * p.grad.double()
        v = beta2 * v.double() + (1 - beta2) * p.grad.double() ** 2
        c1, c2 = (1 - beta1**3, 1 - beta2**3) if bias_correction else (1.0, 1.0)
        u = m / c1 / ((v / c2).sqrt() + eps)
        relative = (p.detach().double() + u).abs() / u
        assert relative.max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("clip", [None, 1.0])
def test_is_as_exact_as_timm(implementation, monkeypatch, clip):
    timm = pytest.importorskip("timm.optim.lamb")
    monkeypatch.setattr(cpu, "PIECE", 1 << 16)
    monkeypatch.setattr(cpu, "KEPT", 1 << 18)
    shapes = ((150, 1009), (1009,), (600_011,))  # several pieces, one, and more than wait for their norm
    start = [0.02 * random(*s, seed=i, dtype=torch.float32) for i, s in enumerate(shapes)]
    grads = [[random(*s, seed=9 * t + i, dtype=torch.float32) for i, s in enumerate(shapes)] for t in (1, 2)]

    def stepped(build, dtype, **options):
        params = [torch.nn.Parameter(p.to(dtype)) for p in start]
        groups = [{"params": params[::2], "weight_decay": 0.05}, {"params": params[1:2], "weight_decay": 0.0}]
        optimizer = build(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-6, max_grad_norm=clip, **options)
        run(params, optimizer, grads)
        return [(p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]) for p in params]

    ours, peer = stepped(ek.FusedLAMB, torch.float32), stepped(timm.Lamb, torch.float32, foreach=False)
    with ek.using("reference"):
        oracle = stepped(ek.FusedLAMB, torch.float64)
    for of_param in zip(ours, peer, oracle, strict=True):
        for what, a, p, o in zip(("p", "exp_avg", "exp_avg_sq"), *of_param, strict=True):
            numerics.assert_as_exact_as(a, p, o, numerics.OUTPUTS, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_half_precision_parameters_follow_a_float32_master(implementation, small_pieces, dtype, clip):
    params, groups, grads = model(dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    wide_groups = [group | {"params": wide[:4] if k == 0 else wide[4:]} for k, group in enumerate(groups)]
    optimizer = ek.FusedLAMB(groups, lr=0.02, max_grad_norm=clip)
    run(params, optimizer, grads)
    run(wide, ek.FusedLAMB(wide_groups, lr=0.02, max_grad_norm=clip), grads)
    for p, w in zip(params, wide, strict=True):
        assert torch.equal(optimizer.state[p]["master"], w)
        assert torch.equal(p, w.to(dtype))
        assert {t.dtype for t in optimizer.state[p].values()} == {torch.float32}


@pytest.mark.parametrize("trust", ["parameter", ("shard", 2)], ids=str)
def test_memory_layout_of_parameters_and_gradients_does_not_matter(implementation, small_pieces, trust):
    def stepped(layout):
        params = [torch.nn.Parameter(layout(random(2, 3, 2, 2, seed=1))), torch.nn.Parameter(random(5, seed=2))]
        optimizer = ek.FusedLAMB(params, lr=0.1, weight_decay=0.05, trust=trust, max_grad_norm=1.0)
        for t in (3, 4):
            params[0].grad, params[1].grad = layout(random(2, 3, 2, 2, seed=t)), random(5, seed=t)
            optimizer.step()
        return params

    expected = stepped(lambda x: x)
    for layout in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        for a, e in zip(stepped(layout), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-13, atol=0)


def test_float32_and_float64_parameters_may_share_an_optimizer():
    def start():
        params = [torch.nn.Parameter(random(5, seed=i, dtype=d)) for i, d in ((1, torch.float32), (2, torch.float64))]
        return params, [[random(5, seed=9 + i, dtype=p.dtype) for i, p in enumerate(params)]]

    (together, grads), (apart, _) = start(), start()
    run(together, ek.FusedLAMB(together, lr=0.1, weight_decay=0.05), grads)
    for k in (0, 1):
        run(apart[k : k + 1], ek.FusedLAMB(apart[k : k + 1], lr=0.1, weight_decay=0.05), [grads[0][k : k + 1]])
        torch.testing.assert_close(together[k], apart[k], rtol=4 * torch.finfo(apart[k].dtype).eps, atol=0)
    with ek.using("cpu"), pytest.raises(NotImplementedError, match="moments of one dtype, not float32 and float64"):
        ek.FusedLAMB(together).step()


def test_gradients_survive(implementation, small_pieces):
    for dtype in (torch.float32, torch.bfloat16):
        params, groups, grads = model(dtype)
        optimizer = ek.FusedLAMB(groups, max_grad_norm=0.1)
        optimizer.grad_scale = torch.tensor(3.0)
        run(params, optimizer, grads)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads[-1], strict=True))


def test_repeats_are_bitwise_equal(implementation):
    def once():
        params = [torch.nn.Parameter(random(700, 300, seed=1, dtype=torch.float32))]
        grads = [[random(700, 300, seed=s, dtype=torch.float32)] for s in (2, 3)]
        return run(params, ek.FusedLAMB(params, weight_decay=0.05, max_grad_norm=1.0), grads)[0]

    first = once()
    assert all(torch.equal(once(), first) for _ in range(3))


def test_scale_and_found_inf_reach_the_step(implementation):
    params, groups, grads = model()
    expected = by_hand(groups, grads, max_grad_norm=1.0, lr=0.02)
    optimizer = ek.FusedLAMB(groups, max_grad_norm=1.0, lr=0.02)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    scaled = [[1024 * g for g in of_step] for of_step in grads]
    assert_equal_to(run(params, optimizer, scaled), expected)
    norm = torch.stack([g.norm() for g in grads[-1]]).norm()
    torch.testing.assert_close(optimizer.grad_norm, norm)

    before = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in params])
    optimizer.found_inf = torch.tensor(2.0)
    run(params, optimizer, [[torch.full_like(p, math.inf) for p in params]])
    for p, (old, state) in zip(params, before, strict=True):
        assert torch.equal(p, old)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())


def arguments(dtypes=(torch.float32, torch.bfloat16), **changes):
    """What the op takes, for two groups of two tensors."""
    params = [random(3, 2, seed=i, dtype=dtypes[i % 2]) for i in range(4)]
    named = {
        "params": params,
        "grads": [random(3, 2, seed=9 + i, dtype=p.dtype) for i, p in enumerate(params)],
        "exp_avgs": [torch.zeros(3, 2) for _ in params],
        "exp_avg_sqs": [torch.zeros(3, 2) for _ in params],
        "masters": [p.float() for p in params if p.dtype != torch.float32],
        "steps": [torch.tensor(0.0) for _ in params],
        "sizes": [2, 2],
        "lrs": torch.tensor([0.1, 0.2], dtype=torch.float64),
        "beta1s": [0.9, 0.8],
        "beta2s": [0.98, 0.99],
        "epss": [1e-6, 1e-8],
        "weight_decays": [0.05, 0.0],
        "lows": [0.0, 0.01],
        "highs": [math.inf, 10.0],
        "adapts": [True, False],
        "bias_correction": "update",
        "slices": 0,
        "max_grad_norm": None,
        "grad_scale": None,
        "found_inf": None,
    }
    return tuple((named | changes).values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"slices": 2, "max_grad_norm": 1.0, "bias_correction": "step_size"},
        {"dtypes": (torch.bfloat16, torch.float16), "grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)},
        {"dtypes": (torch.float32,) * 2, "found_inf": torch.tensor(1.0), "max_grad_norm": 1.0},
    ],
)
def test_op_passes_opcheck(implementation, changes):
    opcheck(torch.ops.evakernels.lamb_step.default, arguments(**changes))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_op_equals_eager(backend):
    def step(*args):
        return torch.ops.evakernels.lamb_step(*args)[0] * 2

    eager, compiled = arguments(max_grad_norm=1.0), arguments(max_grad_norm=1.0)
    expected = step(*eager)
    assert torch.equal(torch.compile(step, fullgraph=True, backend=backend)(*compiled), expected)
    for a, e in zip(compiled[:6], eager[:6], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, e, strict=True))
