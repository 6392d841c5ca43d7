"""FusedLAMB as an optimizer: its state, checkpoints, gradient scaling, groups and refusals."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from timm.optim import Lamb
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from train.ranked import equal

from evakernels import FusedLAMB

HALF = (torch.bfloat16, torch.float16)


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)).to(dtype)


def groups_of(model):
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.05, "lr_scale": 0.5},
        {"params": [p for p in params if p.dim() <= 1]},
    ]


def trained(dtype=torch.float32, steps=3, **options):
    model = net(dtype)
    optimizer = FusedLAMB(groups_of(model), lr=0.01, **options)
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, optimizer


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def assert_same_state(a, b):
    """The states of two optimizers are the same bit for bit, and share no memory."""
    for p, q in zip(*([p for group in o.param_groups for p in group["params"]] for o in (a, b)), strict=True):
        assert a.state[p].keys() == b.state[q].keys() and a.state[p]
        for key, value in a.state[p].items():
            other = b.state[q][key]
            assert value.dtype == other.dtype == torch.float32, key
            assert torch.equal(value, other), key
            assert value.data_ptr() != other.data_ptr(), key


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("way", [lambda state: state, copy.deepcopy, through_file], ids=["same", "copy", "file"])
def test_state_survives_state_dict_bit_for_bit(dtype, way):
    model, optimizer = trained(dtype, max_grad_norm=1.0)
    assert ("master" in optimizer.state[model[0].weight]) == (dtype in HALF)
    other = copy.deepcopy(model)
    resumed = FusedLAMB(groups_of(other), lr=0.01, max_grad_norm=1.0)
    resumed.load_state_dict(way(optimizer.state_dict()))
    assert_same_state(optimizer, resumed)
    for m, o in ((model, optimizer), (other, resumed)):
        step(m, o, 9)
    assert_same_state(optimizer, resumed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_go_on_alike(way):
    pair = trained(torch.bfloat16, max_grad_norm=0.5, trust=("shard", 2), bias_correction="step_size")
    twin = way(pair)
    assert_same_state(pair[1], twin[1])
    for model, optimizer in (pair, twin):
        step(model, optimizer, 9)
    assert_same_state(pair[1], twin[1])
    assert torch.equal(pair[1].grad_norm, twin[1].grad_norm)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_survives_distributed_checkpoint(tmp_path, dtype, flat):
    model, optimizer = trained(dtype)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    dcp.save(get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=tmp_path, no_dist=True)

    other = copy.deepcopy(model)
    for p in other.parameters():
        p.grad = None
    before = [p.detach().clone() for p in other.parameters()]
    resumed = FusedLAMB(groups_of(other), lr=0.5)
    state = get_optimizer_state_dict(other, resumed, options=options)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert_same_state(optimizer, resumed)
    assert resumed.param_groups[0]["lr"] == 0.01
    assert resumed.param_groups[0]["lr_scale"] == 0.5
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
    for m, o in ((model, optimizer), (other, resumed)):
        step(m, o, 9)
    assert_same_state(optimizer, resumed)


def test_a_state_of_another_shape_is_refused_and_nothing_loaded():
    """As of a model of another image size, or of parameters in another order: kernels go by the parameter's shape."""
    a, b = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 4), (5,)))
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer = FusedLAMB([a, b])
    optimizer.step()
    other = FusedLAMB([b, a])
    other.step()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(3, 4\) .* the parameter \(5,\)"):
        other.load_state_dict(optimizer.state_dict())
    assert equal(other.state_dict(), before)
    a.data = torch.ones(9, 9)
    a.grad = torch.ones(9, 9)
    with pytest.raises(RuntimeError, match=r"shape \(9, 9\), its moments \(3, 4\)"):
        optimizer.step()


@pytest.mark.parametrize("number", [int, float, torch.as_tensor])
def test_the_state_of_a_lamb_that_counts_steps_by_group_goes_on(number):
    """timm's, NVIDIA's and EVA-CLIP's own keep the number of steps beside the options."""
    model, theirs = net(), net()
    peer = Lamb(groups_of(theirs), lr=0.01, max_grad_norm=1.0, betas=(0.9, 0.98))
    for seed in range(3):
        step(theirs, peer, seed)
    model.load_state_dict(theirs.state_dict())
    optimizer, state = FusedLAMB(groups_of(model), max_grad_norm=1.0), peer.state_dict()
    for group in state["param_groups"]:
        group["step"] = number(group["step"])
    optimizer.load_state_dict(state)
    for m, o in ((theirs, peer), (model, optimizer)):
        step(m, o, 9)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    for group in state["param_groups"]:
        del group["step"]
    with pytest.raises(ValueError, match="moments of parameter 0, but not how many steps"):
        optimizer.load_state_dict(state)


def test_loaded_state_moves_to_the_device_of_its_parameter():
    _, optimizer = trained(torch.bfloat16)
    resumed = FusedLAMB(groups_of(net(torch.bfloat16).to("meta")))
    resumed.load_state_dict(optimizer.state_dict())
    tensors = [value for state in resumed.state.values() for value in state.values()]
    assert tensors and all((t.device.type, t.dtype) == ("meta", torch.float32) for t in tensors)


def test_loading_hooks_of_the_caller_see_and_change_the_state():
    model, optimizer = trained(torch.bfloat16)
    resumed = FusedLAMB(groups_of(model))
    seen = []

    def double(_, state_dict):
        state = {k: v | {"exp_avg": 2 * v["exp_avg"]} for k, v in state_dict["state"].items()}
        return state_dict | {"state": state}

    resumed.register_load_state_dict_pre_hook(double)
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(o.state[model[0].weight]["master"].dtype))
    resumed.load_state_dict(optimizer.state_dict())
    weight = model[0].weight
    assert torch.equal(resumed.state[weight]["exp_avg"], 2 * optimizer.state[weight]["exp_avg"])
    assert seen == [torch.float32]


def test_parameters_may_change_their_precision_between_runs():
    _, half = trained(torch.bfloat16)
    wide_model, wide = trained(torch.float32)
    resumed = FusedLAMB(groups_of(net(torch.float32)))
    resumed.load_state_dict(half.state_dict())
    assert all("master" not in state for state in resumed.state.values())
    model = net(torch.bfloat16)
    resumed = FusedLAMB(groups_of(model))
    resumed.load_state_dict(wide.state_dict())
    step(model, resumed, 9)
    assert torch.equal(model[0].weight, resumed.state[model[0].weight]["master"].bfloat16())
    assert torch.equal(wide.state[wide_model[0].weight]["step"], torch.tensor(3.0))


def test_options_a_checkpoint_lacks_are_those_of_the_constructor():
    model = net()
    adam = torch.optim.AdamW(groups_of(model), lr=0.25)
    step(model, adam, 0)
    optimizer = FusedLAMB(groups_of(model), trust_ratio_bounds=(0.01, 10.0))
    optimizer.load_state_dict(adam.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert [group["trust_ratio_bounds"] for group in optimizer.param_groups] == [(0.01, 10.0)] * 2
    step(model, optimizer, 1)
    assert optimizer.state[model[0].weight]["step"] == 2


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradient_scaler_steps_and_skips(dtype, unscale):
    if unscale and dtype == torch.float16:
        pytest.skip("GradScaler.unscale_ refuses float16 gradients")
    model, twin = net(dtype), net(dtype)
    optimizer, plain = (FusedLAMB(groups_of(m), lr=0.01, max_grad_norm=0.5) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)

    def backward(m, scale):
        for p in m.parameters():
            p.grad = None
        scale(m(x).square().mean()).backward()

    scale = scaler.get_scale()
    for spoiled in (False, True, False):
        backward(model, scaler.scale)
        if spoiled:
            model[2].bias.grad[1] = torch.inf
        before = copy.deepcopy([[p.detach(), optimizer.state[p]] for p in model.parameters()])
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if spoiled:
            for p, (old, state) in zip(model.parameters(), before, strict=True):
                assert torch.equal(p, old)
                assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
        else:
            # Scaled in float16, gradients below its normal range are more exact: the same are compared.
            backward(twin, lambda loss: loss)
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.grad = q.grad if unscale else q.grad.float().div(scale).to(dtype)
            plain.step()
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                assert torch.equal(p, q)
        scale = scaler.get_scale()
    assert scale == 32.0
    assert optimizer.state[model[0].weight]["step"] == 2
    assert not hasattr(optimizer, "found_inf") and torch.isfinite(optimizer.grad_norm)


def test_gradient_norm_is_that_before_the_limit():
    model, optimizer = trained(max_grad_norm=0.5)
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(optimizer.grad_norm, expected)
    assert optimizer.grad_norm.shape == ()
    assert trained()[1].grad_norm is None


def test_parameters_without_gradient_are_skipped():
    model = net()
    optimizer = FusedLAMB(model.parameters(), weight_decay=0.1, max_grad_norm=1.0)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert optimizer.grad_norm is None
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    changed = [name for name, p in model.state_dict().items() if not torch.equal(p, before[name])]
    assert changed == ["0.weight"]
    assert list(optimizer.state) == [model[0].weight]


def test_schedule_writes_lr_and_groups_have_their_own_options():
    model, twin = net(), net()
    optimizer = FusedLAMB(groups_of(model), lr=0.1)
    assert [group.get("lr_scale") for group in optimizer.param_groups] == [0.5, None]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t == 0 else 0.0)
    step(model, optimizer, 1)
    schedule.step()
    stopped = copy.deepcopy(model.state_dict())
    step(model, optimizer, 2)
    assert all(torch.equal(p, stopped[name]) for name, p in model.state_dict().items())

    own = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "trust_ratio_bounds": (0.5, 2.0), "adapt_excluded": True}
    apart = FusedLAMB([{"params": [twin[0].weight], **own}, {"params": [twin[2].weight]}], lr=0.2)
    other = net()
    alone = [FusedLAMB([other[0].weight], **own), FusedLAMB([other[2].weight], lr=0.2)]
    step(twin, apart, 1)
    for optimizer in alone:
        step(other, optimizer, 1)
    for i in (0, 2):
        assert torch.equal(twin[i].weight, other[i].weight)


def test_learning_rate_may_be_a_tensor():
    (model, twin), lr = (net(), net()), torch.tensor(0.25)
    for m, rate in ((model, lr), (twin, 0.25)):
        optimizer = FusedLAMB(groups_of(m), lr=rate, capturable=True)
        step(m, optimizer, 1)
        if m is model:
            lr.fill_(0.5)
        else:
            for group in optimizer.param_groups:
                group["lr"] = 0.5
        step(m, optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_first_step_is_not_captured(monkeypatch):
    """Its zeros would be filled in at every replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = FusedLAMB([parameter], capturable=True)
    with FakeTensorMode():
        rate = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        optimizer._check_capture(torch.device("cuda", 0), [parameter], [rate])
    optimizer.step()
    optimizer._check_capture(torch.device("cuda", 0), [parameter], [rate])


def test_closure_is_called_with_gradients_on_and_its_loss_returned():
    model = net()
    optimizer = FusedLAMB(model.parameters())

    def closure():
        loss = model(torch.ones(2, 5)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert optimizer.state[model[0].weight]["step"] == 1


def test_autograd_notices_that_parameters_changed():
    model = net()
    loss = model(torch.ones(2, 5)).square().sum()
    step(model, FusedLAMB(model.parameters()), 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"lr": -1.0}, "lr is -1.0; give a number that is not negative"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\)"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); give two numbers, at least 0 and below 1"),
        ({"betas": 0.9}, "betas is 0.9"),
        ({"eps": 0.0}, "eps is 0.0; give a positive number"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0; give a positive number, or None"),
        ({"trust_ratio_bounds": (10.0, 0.01)}, r"trust_ratio_bounds is \(10.0, 0.01\); give \(lowest, highest\)"),
        ({"trust_ratio_bounds": 10.0}, "trust_ratio_bounds is 10.0"),
        ({"adapt_excluded": 1}, "adapt_excluded is 1; give True or False"),
        ({"bias_correction": "both"}, 'bias_correction is \'both\'; give "update", "step_size" or None'),
        ({"trust": "tensor"}, 'trust is \'tensor\'; give "parameter", "group" or'),
        ({"trust": ("shard", 0)}, r"trust is \('shard', 0\)"),
        ({"capturable": "yes"}, "capturable is 'yes'"),
    ],
)
def test_constructor_says_which_option_does_not_fit(option, sentence):
    with pytest.raises(ValueError, match=sentence):
        FusedLAMB(net().parameters(), **option)


def test_groups_say_which_option_or_parameter_does_not_fit():
    optimizer = FusedLAMB(net().parameters())
    for group, error, sentence in (
        ({"params": [torch.nn.Parameter(torch.ones(1))], "eps": -1.0}, ValueError, "eps is -1.0"),
        ({"params": [torch.nn.Parameter(torch.ones(1))], "trust": "group"}, ValueError, "trust holds for all groups"),
        (
            {"params": [torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))]},
            TypeError,
            "parameter has dtype torch.complex64; allowed are float32",
        ),
    ):
        with pytest.raises(error, match=sentence):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "eps": 1e-3})
    assert [group["eps"] for group in optimizer.param_groups] == [1e-6, 1e-3]


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="only dense gradients are allowed, so build"):
        FusedLAMB(table.parameters()).step()


def test_parameters_on_two_devices_are_refused():
    params = [torch.nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "meta")]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameters with gradients are on cpu and on meta"):
        FusedLAMB(params).step()
