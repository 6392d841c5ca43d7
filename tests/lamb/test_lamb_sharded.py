"""FusedLAMB on DTensors in several processes: the step is that of whole tensors, whatever shards them."""

import distributed
import numerics
import pytest
import torch
import torch.distributed as dist
from lamb import workers
from lamb.by_hand import RULES, assert_equal_to, by_hand, random
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard

from evakernels import FusedLAMB

TRUSTS = ("parameter", "group", ("shard", 1), ("shard", 2), ("shard", 4), ("shard", 7))
CLIPS = (None, 1.0, 1e3)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_three_steps_are_what_a_calculation_by_hand_gives(world):
    """By hand, the tensors of a group are flattened and cut into R slices."""
    rules = list(RULES.values())
    cases = [
        (torch.float64, layout, {"trust": trust, "max_grad_norm": CLIPS[(i + j) % 3], **rules[(i + 2 * j) % 3]})
        for i, layout in enumerate(workers.LAYOUTS)
        for j, trust in enumerate(TRUSTS)
    ]
    found = distributed.run(workers.all_stepped, world, cases, False)
    _, groups = workers.start(torch.float64)
    grads = workers.gradients(torch.float64)
    expected = [by_hand(groups, grads, lr=0.02, **options) for *_, options in cases]
    norm = torch.stack([g.norm() for g in grads[-1]]).norm()
    for rank in found:
        for (*_, options), (params, _, grad_norm), exact, first in zip(cases, rank, expected, found[0], strict=True):
            assert_equal_to(params, exact)
            if options["max_grad_norm"] is None:
                assert grad_norm is None
            else:
                torch.testing.assert_close(grad_norm, norm, rtol=1e-14, atol=0)
            # Replicas must not drift apart.
            assert all(torch.equal(p, q) for p, q in zip(params, first[0], strict=True)), options


def test_the_range_of_trust_ratios_is_that_of_whole_tensors_on_every_rank():
    options = [{"trust": trust, "adapt_excluded": True} for trust in ("parameter", "group", ("shard", 7))]
    cases = [(layout, given) for layout in ("fsdp", "hsdp", "mixed") for given in options]
    expected = torch.stack(workers.trust_ratios([(None, given) for _, given in cases]))
    assert expected.isfinite().all() and (expected[:, 0] <= expected[:, 1]).all()
    for rank in distributed.run(workers.trust_ratios, 4, cases):
        torch.testing.assert_close(torch.stack(rank), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", ["fsdp", "mixed", "grid"])
def test_is_as_exact_as_the_unsharded_step(layout):
    cases = [
        (dtype, layout, {"trust": trust, "max_grad_norm": 1.0, "adapt_excluded": True})
        for dtype in (torch.float32, torch.bfloat16)
        for trust in ("parameter", ("shard", 2))
    ]
    for (dtype, _, options), (params, states, norm) in zip(
        cases, distributed.run(workers.all_stepped, 4, cases)[1], strict=True
    ):
        peer, peer_states, _ = workers.stepped(dtype, **options)
        # The oracle starts from rounded parameters and gradients, too.
        oracle, oracle_states, oracle_norm = _in_float64(dtype, options)
        numerics.assert_as_exact_as(norm, oracle_norm, oracle_norm, numerics.OUTPUTS, "norm")
        of_each = [(states, params), (peer_states, peer), (oracle_states, oracle)]
        for key in ("exp_avg", "exp_avg_sq", "master"):  # of all parameters together: each has few elements
            flat = [
                torch.cat([state.get(key, p).flatten() for state, p in zip(*both, strict=True)]) for both in of_each
            ]
            assert flat[0].dtype == torch.float32
            numerics.assert_as_exact_as(*flat, numerics.OUTPUTS, key)
        assert all(torch.equal(p, s.get("master", p).to(dtype)) for s, p in zip(states, params, strict=True))


def _in_float64(dtype, options):
    params = [torch.nn.Parameter(p.detach().double()) for p in workers.start(dtype)[0]]
    split = workers.DECAYED
    groups = [{"params": params[:split], "weight_decay": 0.05}, {"params": params[split:], "weight_decay": 0.0}]
    optimizer = FusedLAMB(groups, lr=0.02, **options)
    for grads in workers.gradients(dtype):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.double()
        optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p] for p in params], optimizer.grad_norm


def test_two_all_reduces_over_shard_dimensions():
    tensors, sizes = len(workers.SHAPES), (workers.DECAYED, len(workers.SHAPES) - workers.DECAYED)
    sharded = tensors - 1  # the one without dimensions is plain
    every = {"adapt_excluded": True, "max_grad_norm": 1.0}
    cases = [
        ("fsdp", every),
        ("hsdp", every),
        ("hsdp", every | {"max_grad_norm": None, "trust": "group"}),
        ("fsdp", every | {"trust": ("shard", 5)}),
        ("fsdp", {}),
    ]
    found = distributed.run(workers.traffic, 4, cases)
    for rank, (fsdp, hsdp, group, slices, decayed) in enumerate(found):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert fsdp == [(sharded + 1 + 1, [0, 1, 2, 3]), (sharded, [0, 1, 2, 3])]
        assert hsdp == [(sharded + 1 + 1, pair), (sharded, pair)]
        assert group == [(2 + 1, pair), (2, pair)]
        assert slices == [(5 * 2 + 1 + 1, [0, 1, 2, 3]), (5 * 2, [0, 1, 2, 3])]
        assert decayed == [(sizes[0] - 1 + 1, [0, 1, 2, 3]), (sizes[0] - 1, [0, 1, 2, 3])]


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_overflow_in_one_shard_changes_nothing_anywhere(layout, dtype):
    plain = workers.stepped(dtype, steps=1, max_grad_norm=1.0, trust=("shard", 2))[0]
    for stayed, params, steps, waits in distributed.run(workers.skipped, 4, layout, dtype, ("shard", 2)):
        assert stayed == [True, False, True]
        assert steps == [1.0] * len(workers.SHAPES)
        assert not waits
        for p, q in zip(params, plain, strict=True):  # masters may differ in the last place, their roundings by one
            torch.testing.assert_close(p, q, rtol=torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-12, atol=0)


@pytest.mark.parametrize(("how", "world"), [("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
@pytest.mark.parametrize("scaler", [False, True])
def test_fully_sharded_network_trains_like_a_whole_one(how, world, scaler):
    options = {"max_grad_norm": 0.1, "trust": ("shard", 2)}
    expected, norm, scale = workers.trained("whole", torch.float64, scaler, options)
    assert scale == (32.0 if scaler else None)
    for params, its_norm, its_scale in distributed.run(workers.trained, world, how, torch.float64, scaler, options):
        assert its_scale == scale
        torch.testing.assert_close(its_norm, norm, rtol=1e-12, atol=0)
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("before", "after"), [(("fsdp", 4), ("fsdp", 1)), (("fsdp", 2), ("hsdp", 4))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_checkpoint_goes_on_at_another_world_size(tmp_path, dtype, before, after):
    options = {"max_grad_norm": 1.0, "trust": ("shard", 4), "bias_correction": "step_size", "adapt_excluded": True}
    (how, world), (new_how, new_world) = before, after
    _, saved = distributed.run(workers.saved, world, how, dtype, str(tmp_path), options)[0]
    expected, states = workers.saved("whole", dtype, None, options, 3)
    for loaded, params, its_states in distributed.run(
        workers.resumed, new_world, new_how, dtype, str(tmp_path), options
    ):
        for state, of_save in zip(loaded, saved, strict=True):
            assert state.keys() == of_save.keys()
            for key, value in state.items():
                assert value.dtype == of_save[key].dtype
                assert torch.equal(value, of_save[key]), key
        for p, q, state, whole in zip(params, expected, its_states, states, strict=True):
            assert state["step"] == 3
            if dtype == torch.bfloat16:
                assert torch.equal(p, state["master"].bfloat16())
                # A few units in the last place of the largest: three steps, each rounded in another order.
                few = 8 * torch.finfo(torch.float32).eps * whole["master"].abs().max().item()
                torch.testing.assert_close(state["master"], whole["master"], rtol=0, atol=few)
            else:
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_state_of_whole_tensors_is_divided(dtype):
    model = workers.net(dtype, "whole")
    optimizer = FusedLAMB(model.groups(), lr=0.02)
    workers.backward(model, 0)
    optimizer.step()
    found = distributed.run(workers.loaded, 2, "fsdp", dtype, optimizer.state_dict())
    workers.backward(model, 2)
    optimizer.step()
    for states in found:
        for state, p in zip(states, model.parameters(), strict=True):
            for key in ("exp_avg", "exp_avg_sq"):
                eps = torch.finfo(state[key].dtype).eps
                torch.testing.assert_close(state[key], optimizer.state[p][key], rtol=4 * eps, atol=4 * eps)


def test_gradients_take_the_placement_of_their_parameter():
    whole = torch.nn.Parameter(random(8, 4, seed=1))
    whole.grad = random(8, 4, seed=2)
    FusedLAMB([whole], lr=0.1, weight_decay=0.1).step()
    for params in distributed.run(workers.summed_gradients, 2):
        for p in params:
            torch.testing.assert_close(p, whole.detach(), rtol=1e-13, atol=0)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_refusals(alone):
    def parameter(*placements, mesh=alone):
        return torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, placements))

    partial = torch.nn.Parameter(DTensor.from_local(torch.ones(4), alone, [Partial()]))
    with pytest.raises(
        NotImplementedError, match=r"placements .*Partial.*; allowed are Shard and Replicate, so add up"
    ):
        FusedLAMB([partial])

    plain = torch.nn.Parameter(torch.ones(4, 2))
    plain.grad = torch.ones(4, 2)
    strided = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 2), alone, [_StridedShard(0, split_factor=2)]))
    strided.grad = strided.detach()
    before = strided.to_local().detach().clone()
    with pytest.raises(NotImplementedError, match='which \\("shard", R\\) cannot cut into slices; allowed are'):
        FusedLAMB([plain, strided], trust=("shard", 4), adapt_excluded=True).step()
    assert torch.equal(strided.to_local(), before) and torch.equal(plain.detach(), torch.ones(4, 2))
    FusedLAMB([plain, strided], trust="group", adapt_excluded=True).step()

    p = parameter(Shard(0))
    elsewhere = init_device_mesh("cpu", (1, 1))
    p.grad = distribute_tensor(torch.ones(4, 2), elsewhere, [Replicate(), Shard(0)])
    with pytest.raises(RuntimeError, match=r"its gradient is on .*; give both the same mesh"):
        FusedLAMB([p]).step()

    optimizer, other = FusedLAMB([parameter(Shard(0))]), parameter(Replicate(), Shard(0), mesh=elsewhere)
    other.grad = other.detach().clone()
    saved = FusedLAMB([other])
    saved.step()
    with pytest.raises(ValueError, match=r"load checkpoints of another mesh with torch\.distributed\.checkpoint"):
        optimizer.load_state_dict(saved.state_dict())


def test_autograd_notices_that_parameters_changed(alone):
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4), alone, [Shard(0)]))
    loss = p.square().sum()
    p.grad = p.detach().clone()
    FusedLAMB([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
