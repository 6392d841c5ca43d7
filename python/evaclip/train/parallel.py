"""How a model is spread over the processes of a run."""

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from evaclip.models.clip import CLIP
from evaclip.train.ranks import Ranks
from evaclip.train.recipe import Compute

BACKEND = "inductor"  # of torch.compile


def spread(model: CLIP, compute: Compute, ranks: Ranks, device: torch.device) -> nn.Module:
    """The module to call for features: a model that `shard` has seen, in DDP where `compute.parallel` says so.

    Its gradients are averaged over all processes. Blocks are compiled now, if they are to be.
    """
    if compute.compile:
        compile_blocks(model)
    if ranks.group is None or compute.parallel != "ddp":
        return model
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def shard(model: CLIP, compute: Compute, ranks: Ranks, device: torch.device) -> None:
    """Divide a model's parameters among the processes; they may be on the meta device, and get their values afterwards.

    "ddp" keeps the whole model in every process. "fsdp" shards parameters, gradients and optimizer state, block by
    block (ZeRO-3); "fsdp2" keeps a block's parameters from the forward to the backward pass (ZeRO-2 with sharded
    parameters): less communication, more memory. With `compute.shard` below the number of processes each so many of
    them share one copy (HSDP): parameters are gathered within these, gradients averaged over the copies as well.
    """
    if ranks.group is None or compute.parallel == "ddp":
        return
    parts = compute.shard or ranks.world
    copies = ranks.world // parts
    shape, names = ((copies, parts), ("copies", "shards")) if copies > 1 else ((parts,), ("shards",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dtype = compute.half if compute.autocasts else None
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "reshard_after_forward": compute.parallel == "fsdp",
        "ignored_params": {model.logit_scale},  # a scalar cannot be sharded: `averaged` sees to its gradient
    }
    # A block's last product is a view; the warning is about changing such outputs in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def blocks_of(model: CLIP) -> list[nn.Module]:
    """The blocks of both towers."""
    return [*model.visual.blocks, *model.text.transformer.resblocks]


def compile_blocks(model: CLIP) -> None:
    """Compile the forward pass of each block; what hooks do around it (checkpointing, gathering shards) stays outside.

    Blocks of one shape share their code, but for stochastic depth, whose rate differs from block to block; with and
    without dropped patches, with and without gradients are versions, too.
    """
    blocks, config = blocks_of(model), torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=BACKEND, fullgraph=True, dynamic=False)


def averaged(model: CLIP, compute: Compute, ranks: Ranks) -> None:
    """Average the gradients that the module does not average itself."""
    if ranks.group is not None and compute.parallel != "ddp" and model.logit_scale.grad is not None:
        dist.all_reduce(model.logit_scale.grad, group=ranks.group)
        model.logit_scale.grad /= ranks.world


def grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all gradients, of all shards; float32 whatever their dtype is, on every process the same."""
    grads = [p.grad for p in parameters if p.grad is not None]
    sharded = [grad for grad in grads if isinstance(grad, DTensor)]
    total = _square([grad for grad in grads if not isinstance(grad, DTensor)], grads[0].device)
    if sharded:  # all of them alike, by `spread`
        square = _square([grad.to_local() for grad in sharded], grads[0].device)
        for dim, placement in enumerate(sharded[0].placements):
            if placement.is_shard():
                dist.all_reduce(square, group=sharded[0].device_mesh.get_group(dim))
        total = total + square
    return total.sqrt()


def _square(tensors: list[Tensor], device: torch.device) -> Tensor:
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors, 2, torch.float32)).square().sum()


def unsynchronized(module: nn.Module) -> contextlib.AbstractContextManager:
    """Gradients of backward passes inside stay this process's own, until one outside sums them all.

    Not those of a sharded model: each process would have to keep all of them, unsharded. They are summed every time.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()
