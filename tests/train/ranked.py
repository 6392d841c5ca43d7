"""What the processes of a distributed run do in tests; also the recipe that tests train."""

import dataclasses
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from evaclip.data import DataError
from evaclip.train import checkpoint, parallel
from evaclip.train.parallel import averaged
from evaclip.train.recipe import Recipe, load_recipe
from evaclip.train.step import forward_backward
from evaclip.train.trainer import Trainer


def tiny(**changes) -> Recipe:
    """The digits recipe with a one-layer model; keys are section__field."""
    recipe = load_recipe("digits")
    sections = {
        "model": {"vision": {"layers": 1, "drop_path": 0.0}, "text": {"layers": 1}},
        "data": {"batch_size": 16},
        "schedule": {"steps": 6, "warmup": 2},
        "run": {"log_every": 1, "tensorboard": False},
        "compute": {"threads": 1},
    }
    for key, value in changes.items():
        section, field = key.split("__")
        sections.setdefault(section, {})[field] = value
    return dataclasses.replace(recipe, **{s: dataclasses.replace(getattr(recipe, s), **v) for s, v in sections.items()})


def trainer(folder: str, changes: dict, resume: bool = False) -> Trainer:
    if dist.is_initialized():  # as torchrun tells it
        os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "RANK": str(dist.get_rank())}
    return Trainer(tiny(**changes), Path(folder), resume=resume)


def as_pixels(images: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of normalised grey images as shards give it, uint8; to the nearest level."""
    return ((images + 1) * 127.5).round().to(torch.uint8), ids


def unsharded(folder: str, changes: dict) -> int:
    """Bytes of whole gradients that a sharded model keeps after the backward pass of a micro-batch."""
    it = trainer(folder, changes)
    images, ids = it.source.batch(0)
    with parallel.unsynchronized(it.take.forward):
        image, text, _ = it.take.forward(images, ids, kept=None)
        (image.sum() + text.sum()).backward()
    states = [module._get_fsdp_state() for module in it.model.modules() if isinstance(module, FSDPModule)]
    held = [p for state in states if state._fsdp_param_group for p in state._fsdp_param_group.fsdp_params]
    assert held
    kept = [grad for p in held for grad in (p.unsharded_accumulated_grad, p.unsharded_param.grad)]
    return sum(grad.numel() * grad.element_size() for grad in kept if grad is not None)


def saved_bytes(model, function) -> tuple[int, Any]:
    """Bytes that autograd keeps: of every storage it saved once, weights and buffers of the model left out."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    held = (x.to_local() if isinstance(x, DTensor) else x for x in itertools.chain(model.parameters(), model.buffers()))
    own = {x.untyped_storage().data_ptr() for x in held}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own), result


def saved(folder: str, changes: dict) -> int:
    """Bytes that autograd keeps of a step's forward pass, no patches dropped."""
    it = trainer(folder, changes)
    compute, (images, ids) = it.recipe.compute, it.source.batch(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute.autocasts):
        return saved_bytes(it.model, lambda: it.take.forward(images, ids, kept=None))[0]


def equal(a, b) -> bool:
    """Whether two states are the same, to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: whole(value).clone() for name, value in trainer.model.state_dict().items()}


def whole(x: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor with its shards of all processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(folder: str, changes: dict) -> dict[str, torch.Tensor]:
    """Of the first step, and its loss and accuracies."""
    it = trainer(folder, changes)
    images, ids = it.source.batch(0)
    metrics = forward_backward(it.take.forward, images, ids, it._kept(len(images)), it.recipe, it.ranks)
    averaged(it.model, it.recipe.compute, it.ranks)
    return {n: whole(p.grad) for n, p in it.model.named_parameters()} | metrics


def compiled_gradients(folder: str, changes: dict) -> dict[str, torch.Tensor]:
    """The same of compiled blocks."""
    parallel.BACKEND = "aot_eager"
    return gradients(folder, changes | {"compute__compile": True})


def started(folder: str, changes: dict) -> tuple[dict[str, torch.Tensor], bool]:
    """The weights a run starts with, and whether its model had any memory when it was sharded."""
    taken, shard = [], parallel.fully_shard
    parallel.fully_shard = lambda module, **options: (
        taken.extend(p for p in module.parameters() if not p.is_meta), shard(module, **options)
    )  # fmt: skip
    try:
        return weights(trainer(folder, changes)), bool(taken)
    finally:
        parallel.fully_shard = shard


def run(folder: str, changes: dict, resume: bool = False) -> tuple[str, int, dict]:
    """The outcome, the step and the weights of a run."""
    it = trainer(folder, changes, resume)
    return it.run(), it.step, weights(it)


def signalled(folder: str, changes: dict, victim: int) -> tuple[str, int, int]:
    """A signal reaches one process alone, in its third step; the outcome, and the checkpoint's step."""
    it = trainer(folder, changes)
    step = it.train_step

    def with_signal():
        if it.step == 2 and it.ranks.rank == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    it.train_step = with_signal
    outcome = it.run()
    return outcome, it.step, checkpoint.load_trainer(checkpoint.latest(Path(folder)))["step"]


def spoilt(folder: str, changes: dict, victim: int) -> tuple[str, int]:
    """One process cannot read its share of the fourth batch."""
    it = trainer(folder, changes)
    batch = it.source.batch

    def read(step):
        if step == 3 and it.ranks.rank == victim:
            raise DataError("12 of 40 images are unreadable")
        return batch(step)

    it.source.batch = read
    return it.run(), it.step


def disk_full(folder: str, changes: dict) -> tuple[str, int]:
    """The first process's disk is full when the second checkpoint is written."""
    it = trainer(folder, changes)
    save, written = torch.save, []

    def full(value, file, **options):
        written.extend([file] if isinstance(file, Path) else [])
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return save(value, file, **options)

    torch.save = full
    try:
        it.run()
    except checkpoint.CheckpointError as error:
        return str(error), checkpoint.load_trainer(checkpoint.latest(Path(folder)))["step"]
    finally:
        torch.save = save
    return "", -1


def overflow(folder: str, changes: dict) -> tuple[dict, bool, bool]:
    """The scale after an overflow of the last process's own gradients and a good step; whether these moved weights."""
    it = trainer(folder, changes)
    before, hooks = weights(it), []
    if it.ranks.rank == it.ranks.world - 1:
        hooks = [it.model.logit_scale.register_hook(lambda gradient: gradient / 0)]
    it.train_step()
    after = weights(it)
    for hook in hooks:
        hook.remove()
    it.train_step()
    unchanged, learned = (
        all(torch.equal(a[name], b[name]) for name in a) for a, b in ((before, after), (after, weights(it)))
    )
    return dataclasses.asdict(it.scale), unchanged, not learned


def kept(folder: str, changes: dict) -> torch.Tensor:
    """The patch ids of this process's share of the second batch."""
    it = trainer(folder, changes)
    it.step = 1
    share = it.ranks.share(it.recipe.data.batch_size)
    return it._kept(share.stop - share.start)
