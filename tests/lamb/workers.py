"""What the processes of a group do in the tests of FusedLAMB on DTensors."""

import copy
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lamb.by_hand import random
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evakernels import FusedLAMB

# Odd sizes: on 4 ranks some have less, some nothing of a tensor.
SHAPES = ((5, 3), (7,), (2, 3, 2), (), (11,), (1, 6), (0,), (9, 2))
DECAYED = 5  # parameters in the first group, the rest in the second

# The placement of each parameter in turn, on a mesh of one dimension or of two; None: a plain tensor.
LAYOUTS = {
    "fsdp": ["flat", (Shard(0),)],
    "hsdp": ["grid", (Replicate(), Shard(0))],
    "mixed": ["flat", (Shard(0),), None, (Replicate(),), (Shard(-1),)],
    "grid": ["grid", (Shard(0), Shard(-1)), (Shard(0), Shard(0)), (Replicate(), Shard(0)), None, (Shard(-1), Shard(0))],
    "two meshes": ["two", (Shard(0),), (Replicate(), Shard(0)), (Shard(0),)],
}


def mesh(kind: str):
    size = dist.get_world_size()
    if kind == "flat":
        return init_device_mesh("cpu", (size,))
    return init_device_mesh("cpu", (max(size // 2, 1), min(size, 2)), mesh_dim_names=("replicate", "shard"))


def distributed(tensors: list[Tensor], layout: str) -> list[Tensor]:
    kind, *placements = LAYOUTS[layout]
    meshes = {1: mesh("flat"), 2: mesh("grid")} if kind == "two" else {1: mesh(kind), 2: mesh(kind)}
    found = []
    for i, x in enumerate(tensors):
        places = placements[i % len(placements)]
        if places is None or not x.dim():
            found.append(x.clone())
        else:
            places = [Shard(x.dim() - 1) if p == Shard(-1) else p for p in places]
            found.append(distribute_tensor(x, meshes[len(places)], places, src_data_rank=None))
    return found


def start(dtype: torch.dtype, layout: str | None = None):
    """Parameters in two groups, with decay and without; everywhere whole where there is no layout."""
    tensors = [random(*s, seed=i).to(dtype) for i, s in enumerate(SHAPES)]
    params = [torch.nn.Parameter(x) for x in (distributed(tensors, layout) if layout else tensors)]
    return params, [
        {"params": params[:DECAYED], "weight_decay": 0.05},
        {"params": params[DECAYED:], "weight_decay": 0.0},
    ]


def gradients(dtype: torch.dtype, steps: int = 3, scale: float = 1.0) -> list[list[Tensor]]:
    return [
        [(scale * random(*s, seed=100 * t + i)).to(dtype) for i, s in enumerate(SHAPES)] for t in range(1, steps + 1)
    ]


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def stepped(dtype: torch.dtype, layout: str | None = None, steps: int = 3, whole_states: bool = True, **options):
    """Whole parameters, whole states and the norm of the gradients after some steps."""
    params, groups = start(dtype, layout)
    optimizer = FusedLAMB(groups, lr=0.02, **options)
    for grads in gradients(dtype, steps):
        for p, g in zip(params, distributed(grads, layout) if layout else grads, strict=True):
            p.grad = g
        optimizer.step()
    for p in params:
        for key, value in optimizer.state[p].items():
            if key != "step" and isinstance(p, DTensor):
                assert (value.placements, value.shape, value.stride()) == (p.placements, p.shape, p.stride()), key
    states = [{key: full(value) for key, value in optimizer.state[p].items()} for p in params] if whole_states else []
    return [full(p) for p in params], states, optimizer.grad_norm


def all_stepped(cases: list[tuple], whole_states: bool = True) -> list:
    return [stepped(dtype, layout, whole_states=whole_states, **options) for dtype, layout, options in cases]


def trust_ratios(cases: list[tuple]) -> list[Tensor]:
    """The range of the trust ratios of each case's third step."""
    found = []
    for layout, options in cases:
        params, groups = start(torch.float64, layout)
        optimizer = FusedLAMB(groups, lr=0.02, **options)
        for grads in gradients(torch.float64):
            for p, g in zip(params, distributed(grads, layout) if layout else grads, strict=True):
                p.grad = g
            optimizer.step()
        found.append(optimizer.trust_ratios)
    return found


def traffic(cases: list[tuple]) -> list[list[tuple[int, list[int]]]]:
    """The all-reduces of each optimizer's second step: how many numbers, over which ranks."""
    found, reduce = [], dist.all_reduce
    for layout, options in cases:
        params, groups = start(torch.float32, layout)
        optimizer = FusedLAMB(groups, **options)
        calls: list = []

        def counted(buffer, group, calls=calls):
            calls.append((buffer.numel(), dist.get_process_group_ranks(group)))
            reduce(buffer, group=group)

        for grads in gradients(torch.float32, 2):
            for p, g in zip(params, distributed(grads, layout), strict=True):
                p.grad = g
            calls.clear()
            optimizer.found_inf = torch.tensor(0.0)
            with mock.patch.object(dist, "all_reduce", counted):
                optimizer.step()
        found.append(calls)
    return found


class Waits(TorchDispatchMode):
    """Collects the operators that would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero"):
            self.found.append(name)
        return function(*args, **kwargs or {})


def skipped(layout: str, dtype: torch.dtype, trust):
    """Three steps of which the first and the last overflow, on the ranks that have the infinite element.

    For each step whether this rank's bits stayed; parameters and numbers of steps; what would have waited.
    """
    params, groups = start(dtype, layout)
    optimizer = FusedLAMB(groups, lr=0.02, max_grad_norm=1.0, trust=trust)
    good, bad = gradients(dtype, 2, scale=4.0)
    bad[0][0, 0] = torch.inf
    stayed, waits = [], Waits()
    for grads in (bad, good, bad):
        for p, g in zip(params, distributed(grads, layout), strict=True):
            p.grad = g
        before = copy.deepcopy([[p.detach(), *optimizer.state[p].values()] for p in params])
        seen = not all(torch.isfinite(_local(p.grad)).all() for p in params)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(seen))
        with waits:
            optimizer.step()
        after = [[p.detach(), *optimizer.state[p].values()] for p in params]
        pairs = ((_local(x), _local(y)) for b, a in zip(before, after, strict=True) for x, y in zip(b, a, strict=False))
        stayed.append(all(torch.equal(x, y) and torch.equal(x.signbit(), y.signbit()) for x, y in pairs))
    return stayed, [full(p) for p in params], [float(optimizer.state[p]["step"]) for p in params], waits.found


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class Net(torch.nn.Module):
    """Three layers whose sizes 4 does not divide."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)
        self.to(dtype)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(random(*p.shape, seed=i))

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())

    def groups(self):
        params = list(self.parameters())
        return [
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in params if p.dim() <= 1], "lr": 0.03},
        ]


def net(dtype: torch.dtype, how: str) -> Net:
    model = Net(dtype)
    if how != "whole":
        for part in (model.first, model):
            fully_shard(part, mesh=mesh("flat" if how == "fsdp" else "grid"))
    return model


def trained(how: str, dtype: torch.dtype, scaler: bool, options: dict):
    """Three steps of a network on 8 samples, each rank its share (all of them where the network is whole)."""
    model = net(dtype, how)
    optimizer = FusedLAMB(model.groups(), lr=0.02, **options)
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaler)
    for t in range(3):
        x = random(8, 5, seed=50 + t).to(dtype)
        if how != "whole":
            x = x.chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        loss = grad_scaler.scale(model(x).square().mean())
        loss.backward()
        if scaler and t == 1:  # in the first shard alone
            grad = model.first.weight.grad
            if how == "whole" or dist.get_rank() % (2 if how == "hsdp" else dist.get_world_size()) == 0:
                _local(grad)[:1] = torch.inf
        grad_scaler.step(optimizer)
        grad_scaler.update()
    return [full(p) for p in model.parameters()], optimizer.grad_norm, grad_scaler.get_scale() if scaler else None


def backward(model: Net, seed: int) -> None:
    for i, p in enumerate(model.parameters()):
        g = random(*p.shape, seed=1000 * seed + i).to(p.dtype)
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def _states(model: Net, optimizer: FusedLAMB):
    return [{key: full(value) for key, value in optimizer.state[p].items()} for p in model.parameters()]


def saved(how: str, dtype: torch.dtype, folder: str | None, options: dict, steps: int = 2):
    """Train from random gradients, save if asked to; parameters and states."""
    model = net(dtype, how)
    optimizer = FusedLAMB(model.groups(), lr=0.02, **options)
    for t in range(steps):
        backward(model, t)
        optimizer.step()
    if folder is not None:
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder)
    return [full(p) for p in model.parameters()], _states(model, optimizer)


def resumed(how: str, dtype: torch.dtype, folder: str, options: dict):
    """Load, and go one step further; states as they were loaded, then parameters and states."""
    model = net(dtype, how)
    optimizer = FusedLAMB(model.groups(), lr=0.5, **options)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    loaded = _states(model, optimizer)
    backward(model, 2)
    optimizer.step()
    return loaded, [full(p) for p in model.parameters()], _states(model, optimizer)


def loaded(how: str, dtype: torch.dtype, state: dict):
    """A state of whole tensors given to `load_state_dict`, then one step."""
    model = net(dtype, how)
    optimizer = FusedLAMB(model.groups(), lr=0.02)
    optimizer.load_state_dict(state)
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].placements == p.placements
    backward(model, 2)
    optimizer.step()
    return _states(model, optimizer)


def summed_gradients() -> list[Tensor]:
    """A replicated parameter whose gradient is still a partial sum, and one that another dimension shards."""
    size, on = dist.get_world_size(), mesh("flat")
    params = [torch.nn.Parameter(distribute_tensor(random(8, 4, seed=1), on, [p])) for p in (Replicate(), Shard(0))]
    grad = random(8, 4, seed=2)
    params[0].grad = DTensor.from_local(grad / size, on, [Partial()])
    params[1].grad = distribute_tensor(grad, on, [Shard(1)])
    FusedLAMB(params, lr=0.1, weight_decay=0.1).step()
    return [full(p) for p in params]
