"""The CUDA kernels of LAMB against the float64 formula; without a GPU, emulated on the CPU."""

import math
import os
from itertools import pairwise

import numerics
import pytest
import torch
from lamb.by_hand import DEEPSPEED, RULES, random
from lamb.test_lamb_step import GRADIENTS, PUBLISHED, START, run
from torch.library import opcheck

import evakernels as ek
from evakernels.ops.lamb import cuda

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
# Sizes, dtypes and dtypes of the gradients; in three groups, of which the second has no trust ratio by default.
MIXED = (
    (1, FLOAT, FLOAT), (4097, FLOAT, FLOAT), (3, BF16, BF16), (100001, FLOAT, FLOAT), (4096, HALF, HALF),
    (4095, FLOAT, FLOAT), (0, FLOAT, FLOAT), (3, FLOAT, FLOAT), (5001, BF16, FLOAT),
    (3, FLOAT, BF16), (4096, BF16, BF16), (4095, HALF, FLOAT), (1, HALF, HALF), (9000, FLOAT, FLOAT), (0, BF16, BF16),
)  # fmt: skip
SIZES = (5, 4, 6)
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "masters", "steps")


def arguments(specs=MIXED, sizes=SIZES, *, trained=True, seed=0, **changes):
    """What the op takes, on the CPU; as after a few steps, or as before the first one."""
    weights = [0.05 * random(n, seed=seed + i, dtype=FLOAT) for i, (n, *_) in enumerate(specs)]
    grads = [0.01 * random(n, seed=seed + 100 + i, dtype=FLOAT) for i, (n, *_) in enumerate(specs)]
    m = [0.003 * random(n, seed=seed + 200 + i, dtype=FLOAT) for i, (n, *_) in enumerate(specs)]
    # Away from 0, so that no error is that of one element whose update is huge.
    v = [(0.004 * (random(n, seed=seed + 300 + i, dtype=FLOAT).abs() + 0.5)) ** 2 for i, (n, *_) in enumerate(specs)]
    groups = len(sizes)
    return {
        "params": [w.to(dtype) for w, (_, dtype, _) in zip(weights, specs, strict=True)],
        "grads": [g.to(dtype) for g, (*_, dtype) in zip(grads, specs, strict=True)],
        "exp_avgs": [x * trained for x in m],
        "exp_avg_sqs": [x * trained for x in v],
        # A master is finer than its parameter.
        "masters": [w for w, (_, dtype, _) in zip(weights, specs, strict=True) if dtype != FLOAT],
        "steps": [torch.tensor(float(trained * (4 + i % 3))) for i in range(len(specs))],
        "sizes": list(sizes),
        "lrs": torch.tensor([0.1, 0.03, 0.2, 0.01][:groups], dtype=torch.float64),
        "beta1s": [0.9, 0.8, 0.95, 0.9][:groups],
        "beta2s": [0.98, 0.99, 0.999, 0.95][:groups],
        "epss": [1e-6, 1e-8, 1e-5, 1e-6][:groups],
        "weight_decays": [0.05, 0.03, 0.2, 0.1][:groups],
        "lows": [0.0, 0.01, 0.0, 0.0][:groups],
        "highs": [math.inf, 10.0, 1.5, math.inf][:groups],
        "adapts": [True, False, True, True][:groups],
        "bias_correction": "update",
        "slices": 0,
        "max_grad_norm": None,
        "grad_scale": None,
        "found_inf": None,
    } | changes  # fmt: skip


def on(device, given):
    """A copy of the arguments; the learning rates stay where they are."""
    copied = dict(given)
    for name in LISTS:
        copied[name] = [t.to(device, copy=True) for t in given[name]]  # keeps strides
    for name in ("grad_scale", "found_inf"):
        copied[name] = None if given[name] is None else given[name].to(device)
    return copied


def stepped(given, device="cpu", implementation="reference"):
    """The arguments after a step, on the CPU again; `total` is what it returned."""
    copied = on(device, given)
    with ek.using(implementation):
        total, ratios = torch.ops.evakernels.lamb_step(*copied.values())
    return on("cpu", copied) | {"total": total.cpu(), "ratios": ratios.cpu()}


def weights_of(given):
    masters = iter(given["masters"])
    return [p if p.dtype in (FLOAT, torch.float64) else next(masters) for p in given["params"]]


def oracle(given):
    """The reference in float64, with the masters as parameters."""
    wide = given | {name: [t.double() for t in given[name]] for name in ("grads", "exp_avgs", "exp_avg_sqs")}
    return stepped(wide | {"params": [w.double() for w in weights_of(given)], "masters": []})


def assert_right(given, device):
    """Compares each group as a whole: the errors of a few elements, of which one tensor may consist, are luck."""
    ours, peer, exact = stepped(given, device, "cuda"), stepped(given), oracle(given)
    for name, of in (("weights", weights_of), *((n, lambda a, n=n: a[n]) for n in ("exp_avgs", "exp_avg_sqs"))):
        first = 0
        for k, size in enumerate(given["sizes"]):
            group = slice(first, first + size)
            first += size
            flat = [torch.cat(of(x)[group]) for x in (ours, peer, exact)]
            numerics.assert_as_exact_as(*flat, numerics.OUTPUTS, f"{name} of group {k}")
    for p, w, step, expected in zip(ours["params"], weights_of(ours), ours["steps"], exact["steps"], strict=True):
        assert torch.equal(p, w.to(p.dtype))
        assert torch.equal(step, expected)
    if given["max_grad_norm"] is not None:
        torch.testing.assert_close(ours["total"].double(), exact["total"], rtol=4 * torch.finfo(FLOAT).eps, atol=0)
    torch.testing.assert_close(ours["ratios"].double(), exact["ratios"].double(), rtol=1e-5, atol=0)


def assert_equal(a, b, names=LISTS):
    for name in names:
        for i, (x, y) in enumerate(zip(a[name], b[name], strict=True)):
            assert torch.equal(x, y), f"{name} {i}"


@pytest.fixture
def small(monkeypatch):
    """Ratios of more chunks than a block wants to sum, and batches of few ratios."""
    monkeypatch.setattr(cuda, "MOST", 3)
    monkeypatch.setattr(cuda, "_batch", lambda device: 12_000)
    cuda._plan.cache_clear()
    yield
    cuda._plan.cache_clear()


@pytest.mark.parametrize("slices", [0, 1, 3, 64])
@pytest.mark.parametrize("bias_correction", ["update", "step_size", "none"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_step_is_as_exact_as_the_formula_in_float32(kernels, slices, bias_correction, max_grad_norm):
    given = arguments(slices=slices, bias_correction=bias_correction, max_grad_norm=max_grad_norm)
    assert_right(given, kernels)


@pytest.mark.parametrize("slices", [0, 1, 7])
def test_long_chunks_and_small_batches(kernels, small, slices):
    assert_right(arguments(slices=slices, adapts=[True] * 3, max_grad_norm=0.5), kernels)


def test_more_chunks_than_threads(kernels, small, monkeypatch):
    """Each thread of a block sums several partials, of the norm of all gradients and of those of a ratio."""
    monkeypatch.setattr(cuda, "CHUNK", 256)
    monkeypatch.setattr(cuda, "MOST", 1000)
    specs = [(100, FLOAT, FLOAT), (100001, FLOAT, FLOAT)]
    assert_right(arguments(specs, (2,), max_grad_norm=0.5), kernels)
    assert cuda._plan((100, 100001), (2,), (True,), 0, 12_000).bounds[-1] == 392


@pytest.mark.parametrize("bias_correction", ["update", "step_size", "none"])
def test_first_step(kernels, bias_correction):
    assert_right(arguments(trained=False, bias_correction=bias_correction), kernels)


def test_a_thousand_tensors(kernels):
    """More words than the arguments of one kernel hold."""
    specs = [(i % 41, (FLOAT, BF16, HALF)[i % 3], FLOAT if i % 2 else (FLOAT, BF16, HALF)[i % 3]) for i in range(1000)]
    assert_right(arguments(specs, (300, 250, 400, 50), max_grad_norm=0.1), kernels)


def test_a_limit_that_is_not_reached_changes_nothing(kernels):
    plain, limited = (stepped(arguments(max_grad_norm=limit), kernels, "cuda") for limit in (None, 1e3))
    assert_equal(plain, limited)
    assert plain["total"].shape == (0,) and limited["total"].shape == ()


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_scaled_gradients_are_scaled_back(kernels, max_grad_norm):
    given = arguments(max_grad_norm=max_grad_norm)
    scaled = given | {"grads": [64 * g for g in given["grads"]], "grad_scale": torch.tensor(64.0)}
    a, b = (stepped(x, kernels, "cuda") for x in (given, scaled))
    assert_equal(a, b, [name for name in LISTS if name != "grads"])
    assert torch.equal(a["total"], b["total"])
    assert_right(given | {"grad_scale": torch.tensor(3.0)}, kernels)


@pytest.mark.parametrize("slices", [0, 2])
def test_found_inf_leaves_everything_as_it_is(kernels, slices):
    given = arguments(slices=slices, max_grad_norm=0.5, grad_scale=torch.tensor(2.0))
    for spoiled in (False, True):
        if spoiled:
            given["grads"][3][5] = math.inf
        skipped = stepped(given | {"found_inf": torch.tensor(1.0)}, kernels, "cuda")
        assert_equal(skipped, given)
        assert torch.isfinite(skipped["total"]) != spoiled
    taken = stepped(arguments(found_inf=torch.tensor(0.0)), kernels, "cuda")
    assert_equal(taken, stepped(arguments(), kernels, "cuda"))


@pytest.mark.parametrize("slices", [0, 2])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_tensors_are_stepped_like_aligned_ones(kernels, offset, slices):
    """Element for element the same, whichever of the tensors is unaligned; and nothing beside them is touched."""
    given = arguments(slices=slices, max_grad_norm=0.5)
    expected = stepped(given, kernels, "cuda")
    for names in (("params",), ("grads",), ("exp_avgs",), ("exp_avg_sqs",), ("masters",), LISTS[:5]):
        copied, buffers = on(kernels, given), []
        for name in names:
            buffers += [torch.full((t.numel() + 8,), math.nan, dtype=t.dtype, device=kernels) for t in copied[name]]
            views = [b[offset : b.numel() - 8 + offset] for b in buffers[-len(copied[name]) :]]
            copied[name] = [view.copy_(t) for view, t in zip(views, copied[name], strict=True)]
        torch.ops.evakernels.lamb_step(*copied.values())
        assert_equal(on("cpu", copied), expected)
        for buffer in buffers:
            assert buffer[:offset].isnan().all() and buffer[buffer.numel() - 8 + offset :].isnan().all()


def test_rates_on_the_device_are_read_there(kernels, monkeypatch):
    expected = stepped(arguments(), kernels, "cuda")
    given = arguments()
    given["lrs"] = given["lrs"].to(kernels)
    monkeypatch.setattr(cuda, "_on_host", lambda lrs: False)
    assert_equal(stepped(given, kernels, "cuda"), expected)


def test_update_is_exact_to_a_few_units_in_the_last_place(kernels):
    """From p = 0 a step of rate 1 leaves -u; all signs agree, so that nothing cancels."""
    for bias_correction in ("update", "none"):
        for adapts in (True, False):  # the ratio of p = 0 is 1
            given = arguments([(10_003, FLOAT, FLOAT)], (1,), adapts=[adapts], bias_correction=bias_correction)
            given |= {"lrs": torch.ones(1), "grads": [g.abs() for g in given["grads"]]}
            given |= {"exp_avgs": [m.abs() for m in given["exp_avgs"]], "params": [torch.zeros(10_003)]}
            (u,), (expected,) = (run["params"] for run in (stepped(given, kernels, "cuda"), oracle(given)))
            assert ((u.double() - expected) / expected).abs().max() <= 4 * torch.finfo(FLOAT).eps


def test_ratio_is_bounded_and_one_where_a_norm_is_zero(kernels):
    n, options = 5000, {"lrs": torch.ones(1, dtype=torch.float64), "weight_decays": [0.0], "bias_correction": "none"}
    for weight, grad, bounds, ratio in (
        (1e-6, 1.0, (0.01, 10.0), 0.01),
        (1e6, 1.0, (0.01, 10.0), 10.0),
        (0.0, 1.0, (0.01, 0.02), 1.0),
        (3.0, 0.0, (0.01, 0.02), 1.0),
    ):
        given = arguments([(n, FLOAT, FLOAT)], (1,), trained=False, **options, lows=[bounds[0]], highs=[bounds[1]])
        given |= {"params": [torch.full((n,), weight)], "grads": [torch.full((n,), grad)]}
        change = weight - stepped(given, kernels, "cuda")["params"][0].double()
        u = 0.1 * grad / (math.sqrt(0.02) * grad + 1e-6)
        expected = torch.full((n,), ratio * u, dtype=torch.float64)
        torch.testing.assert_close(change, expected, rtol=1e-6, atol=weight * 1e-7)


def test_padding_does_not_divide_zero_by_zero(kernels):
    """With eps = 0 the places behind a tensor's end have no update."""
    assert_right(arguments([(7, FLOAT, FLOAT), (4099, FLOAT, FLOAT)], (2,), epss=[0.0]), kernels)


def test_without_elements_the_steps_are_counted(kernels):
    given = arguments([(0, FLOAT, FLOAT)] * 2, (2,), max_grad_norm=1.0)
    after = stepped(given, kernels, "cuda")
    assert [s.item() for s in after["steps"]] == [5.0, 6.0]
    assert after["total"] == 0


@pytest.mark.parametrize("slices", [0, 1, 3])
def test_repeats_and_thread_orders_are_bitwise_equal(kernels, small, monkeypatch, slices):
    given = arguments(slices=slices, adapts=[True] * 3, max_grad_norm=0.5)
    first = stepped(given, kernels, "cuda")
    for seed in range(4):  # of the emulator
        monkeypatch.setitem(os.environ, "EMU_SEED", str(seed))
        again = stepped(given, kernels, "cuda")
        assert_equal(again, first)
        assert torch.equal(again["total"], first["total"])


@pytest.mark.parametrize(("rule", "weight_decay", "expected"), PUBLISHED)
def test_published_optimizers(kernels, rule, weight_decay, expected):
    p = torch.nn.Parameter(torch.tensor(START, device=kernels))
    optimizer = ek.FusedLAMB([p], lr=1e-2, weight_decay=weight_decay, **RULES[rule])
    run([p], optimizer, [[torch.tensor(g, device=kernels)] for g in GRADIENTS])
    # Three steps round the second number, below 2, to multiples of 2^-23.
    torch.testing.assert_close(p.detach().cpu().double(), torch.tensor(expected).double(), rtol=0, atol=3 * 2**-23)


def optimizers(device, dtypes=(FLOAT, BF16), **options):
    """The same model twice, on the device and on the CPU, each with an optimizer."""
    start = [random(n, seed=n, dtype=dtypes[i % 2]) for i, n in enumerate((4097, 300, 1, 5000))]
    for where in (device, "cpu"):
        params = [torch.nn.Parameter(p.to(where, copy=True)) for p in start]
        groups = [{"params": params[:2], "weight_decay": 0.05}, {"params": params[2:]}]
        yield params, ek.FusedLAMB(groups, lr=0.02, **options)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, DEEPSPEED | {"trust": ("shard", 2)}], ids=str)
def test_gradients_may_move(kernels, options):
    """The memory of the last step's gradients belongs to others by now, and has other numbers."""
    (params, optimizer), (twins, twin_optimizer) = optimizers(kernels, **options)
    decoys = []
    for t in range(4):
        grads = [random(p.numel(), seed=10 * t + i, dtype=p.dtype) for i, p in enumerate(twins)]
        optimizer.zero_grad(set_to_none=True)
        decoys += [torch.full_like(p, math.nan) for p in params for _ in range(2)]
        for p, twin, g in zip(params, twins, grads, strict=True):
            p.grad, twin.grad = g.to(kernels, copy=True), g
        optimizer.step()
        with ek.using("reference"):
            twin_optimizer.step()
        # Those that are still there lie: only the new ones may be read.
        for p in params:
            decoys.append(p.grad)
            p.grad = None
            decoys[-1].fill_(math.nan)
    for p, twin in zip(params, twins, strict=True):
        a, b = (optimizer.state[p], twin_optimizer.state[twin])
        weight, expected = a.get("master", p), b.get("master", twin)
        torch.testing.assert_close(weight.detach().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a["exp_avg"].cpu(), b["exp_avg"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=str)
@pytest.mark.parametrize("trust", ["parameter", ("shard", 2)], ids=str)
def test_memory_layout_of_parameters_and_gradients_does_not_matter(kernels, trust, dtype):
    def stepped(layout):
        params = [layout(random(5, 3, 2, 2, seed=1)), random(7, seed=2)]
        params = [torch.nn.Parameter(p.to(kernels, dtype)) for p in params]
        optimizer = ek.FusedLAMB(params, lr=0.1, weight_decay=0.05, trust=trust, max_grad_norm=1.0)
        for t in (3, 4):
            params[0].grad = layout(random(5, 3, 2, 2, seed=t)).to(kernels, dtype)
            params[1].grad = random(7, seed=t).to(kernels, dtype)
            optimizer.step()
        return params

    expected = stepped(lambda x: x)
    for layout in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        for a, e in zip(stepped(layout), expected, strict=True):
            assert torch.equal(a, e)


def test_gradients_survive(kernels):
    given = arguments(max_grad_norm=0.01, grad_scale=torch.tensor(3.0))
    assert_equal(stepped(given, kernels, "cuda"), given, ["grads"])


def test_what_it_does_not_take_is_said(kernels):
    given = arguments([(6, FLOAT, FLOAT)] * 2, (2,))
    wide = {name: [t.double() for t in given[name]] for name in LISTS[:4]}
    turned = [torch.zeros(2, 3).t()] * 2
    for changes, sentence in (
        (wide, "parameters and gradients in float32, bfloat16 and float16, not float64"),
        ({"exp_avgs": wide["exp_avgs"]}, "moments, masters and steps in float32, not float64"),
        ({"exp_avg_sqs": turned}, "contiguous moments, masters and steps"),
    ):
        with pytest.raises(NotImplementedError, match=sentence):
            stepped(given | changes, kernels, "cuda")
    given = on(kernels, given) | {"grads": [g.to("meta") for g in given["grads"]]}
    assert "all tensors must be on" in cuda.refuses("lamb_step", *given.values())


def test_op_passes_opcheck(kernels):
    specs = [(5, FLOAT, FLOAT), (3, BF16, BF16)]
    for changes in ({}, {"slices": 2, "max_grad_norm": 1.0, "found_inf": torch.tensor(0.0)}):
        given = on(kernels, arguments(specs, (1, 1), **changes))
        opcheck(torch.ops.evakernels.lamb_step.default, tuple(given.values()))


@pytest.mark.parametrize("slices", [0, 1, 3, 50])
def test_plan_has_every_element_once_in_its_ratio(monkeypatch, slices):
    monkeypatch.setattr(cuda, "CHUNK", 8)
    monkeypatch.setattr(cuda, "MOST", 4)
    numels, sizes, adapts, batch = (3, 0, 70, 8, 9, 33, 1, 64), (3, 2, 3), (True, False, True), 60
    plan = cuda._plan.__wrapped__(numels, sizes, adapts, slices, batch)
    ratio_of, chunk_of = {}, {}
    for k in range(plan.tensors):
        word, first, size, span, end = plan.pieces[5 * k : 5 * k + 5]
        chunk, tensor, length, begin = word & 0xFFFFFFFF, word >> 32, span & 0xFFFFFFFF, span >> 32
        assert length % 8 == 0 and begin <= chunk and size > 0
        for e in range(size):
            assert (tensor, first + e) not in ratio_of
            ratio_of[tensor, first + e] = (begin, end)
            chunk_of[tensor, first + e] = chunk + e // length
            assert begin <= chunk + e // length < end
    assert sorted(ratio_of) == [(i, e) for i, n in enumerate(numels) for e in range(n)]
    assert sorted(set(chunk_of.values())) == list(range(plan.bounds[-1]))
    first = 0
    for size, adapted in zip(sizes, adapts, strict=True):
        flat = [(i, e) for i in range(first, first + size) for e in range(numels[i])]
        length = -(-len(flat) // slices) if slices else 0
        own = [at // length if slices and adapted else i for at, (i, _) in enumerate(flat)]
        pairs = list(zip(own, (ratio_of[x] for x in flat), strict=True))
        assert all((a == b) == (x == y) for a, x in pairs for b, y in pairs)
        assert all((chunk_of[x] < plan.bounds[0]) != adapted for x in flat)
        first += size
    assert list(plan.bounds) == sorted(set(plan.bounds))
    # A batch has whole ratios, and no more elements than it should unless it is one ratio.
    for begin, end in pairwise(plan.bounds):
        inside = [r for x, r in ratio_of.items() if begin <= chunk_of[x] < end]
        assert all(begin <= r[0] and r[1] <= end for r in inside)
        assert len(inside) <= batch or len(set(inside)) == 1


@pytest.mark.gpu
def test_graph_replays_with_new_rates_and_gradients():
    """Captured once, at the addresses of then; other steps in between do not disturb it."""
    (params, optimizer), (twins, twin_optimizer) = optimizers("cuda", max_grad_norm=1.0, capturable=True)
    rates = [torch.tensor(0.02, dtype=torch.float64, device="cuda") for _ in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate

    def gradients(t):
        return [random(p.numel(), seed=10 * t + i, dtype=p.dtype) for i, p in enumerate(twins)]

    def eager(t, rate):
        for p, g in zip(twins, gradients(t), strict=True):
            p.grad = g
        for group in twin_optimizer.param_groups:
            group["lr"] = rate
        with ek.using("reference"):
            twin_optimizer.step()

    with ek.using("cuda"):
        for p, g in zip(params, gradients(0), strict=True):
            p.grad = g.cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        eager(0, 0.02)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        other = next(iter(optimizers("cuda")))
        for t, rate in ((1, 0.02), (2, 0.5), (3, 0.0)):
            for p, g in zip(params, gradients(t), strict=True):
                p.grad.copy_(g)
            for lr in rates:
                lr.fill_(rate)
            run(*other, [[torch.ones_like(p) for p in other[0]]])
            graph.replay()
            eager(t, rate)
            for p, twin in zip(params, twins, strict=True):
                a, b = (optimizer.state[p].get("master", p), twin_optimizer.state[twin].get("master", twin))
                torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-5, atol=1e-6)
                assert optimizer.state[p]["step"].item() == t + 1


@pytest.mark.gpu
def test_a_step_waits_for_nothing():
    """No copy to the host and no wait for the device, as PyTorch sees it."""
    (params, optimizer), _ = optimizers("cuda", max_grad_norm=1.0)
    optimizer.found_inf = torch.zeros((), device="cuda")
    for p in params:
        p.grad = torch.ones_like(p)
    with ek.using("cuda"):
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
