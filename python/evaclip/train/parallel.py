"""How a model is spread over the processes of a run."""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from evaclip.models.clip import CLIP
from evaclip.train.ranks import Ranks
from evaclip.train.recipe import Compute


def spread(model: CLIP, compute: Compute, ranks: Ranks, device: torch.device) -> nn.Module:
    """The module to call for features whose gradients are averaged over all processes.

    "ddp" keeps the whole model in every process. "fsdp" shards parameters, gradients and optimizer state, block by
    block (ZeRO-3); "fsdp2" keeps a block's parameters from the forward to the backward pass (ZeRO-2 with sharded
    parameters): less communication, more memory.
    """
    if ranks.group is None:
        return model
    if compute.parallel == "ddp":
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (ranks.world,))
    dtype = torch.bfloat16 if compute.precision == "amp_bf16" else None
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "reshard_after_forward": compute.parallel == "fsdp",
        "ignored_params": {model.logit_scale},  # a scalar cannot be sharded: `averaged` sees to its gradient
    }
    for block in (*model.visual.blocks, *model.text.transformer.resblocks):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def averaged(model: CLIP, compute: Compute, ranks: Ranks) -> None:
    """Average the gradients that the module does not average itself."""
    if ranks.group is not None and compute.parallel != "ddp" and model.logit_scale.grad is not None:
        dist.all_reduce(model.logit_scale.grad, group=ranks.group)
        model.logit_scale.grad /= ranks.world


def clip_grad_norm(parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
    """The norm of all gradients, of all shards; where it exceeds `limit` they are scaled to it."""
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in some if p.grad is not None]) for some in (sharded, plain)]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = torch.linalg.vector_norm(torch.stack(whole)) if sharded else whole[1]
    for some in (sharded, plain):
        torch.nn.utils.clip_grads_with_norm_(some, limit, norm)
    return norm


@contextlib.contextmanager
def unsynchronized(module: nn.Module):
    """Gradients of backward passes inside stay this process's own, until one outside sums them all."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield
