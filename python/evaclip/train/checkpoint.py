"""Checkpoints of a run: written whole or not at all, kept in small number, loaded strictly.

<run>/recipe.json
<run>/checkpoints/step-00000500/{recipe.json, model.safetensors, trainer.pt}
<run>/checkpoints/step-00000500/{recipe.json, shards/, trainer.pt}   where parameters are sharded over processes
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from evaclip.files import as_new, flush
from evaclip.models import load_checkpoint
from evaclip.models.clip import CLIP
from evaclip.models.parts import part_of
from evaclip.train.ranks import Ranks
from evaclip.train.recipe import Recipe, save_recipe
from evaclip.weights.files import UnreadableError

WEIGHTS, SHARDS, TRAINER = "model.safetensors", "shards", "trainer.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, truncated, of another run, or could not be written; the message names the file."""


def state_of(model: nn.Module, optimizer: Optimizer, trainer: dict, ranks: Ranks) -> dict[str, Any]:
    """What this process has to write: `trainer`, and where parameters are not sharded the first one all else, too.

    Tensors are the run's own, which the next step changes.
    """
    if sharded(model):
        return {"trainer": trainer, "shards": _states(model, optimizer)}
    if not ranks.first:
        return {"trainer": trainer}
    return {"trainer": trainer | {"optimizer": optimizer.state_dict()}, "weights": model.state_dict()}


def save(run: Path, recipe: Recipe, state: dict[str, Any], ranks: Ranks) -> Path:
    """Write the checkpoint of a `state_of` and drop all but the newest ones; all processes of a run must call.

    Returns:
        its folder.

    Raises:
        CheckpointError: it could not be written (the disk is full, say); the ones before are untouched.
    """
    folder = run / "checkpoints" / f"step-{state['trainer']['step']:08d}"
    partial = folder.with_name(folder.name + ".partial")

    def prepare() -> None:
        for unfinished in folder.parent.glob("*.partial"):
            shutil.rmtree(unfinished)
        partial.mkdir(parents=True)

    def write() -> None:
        if "shards" in state:
            dcp.save(state["shards"], checkpoint_id=partial / SHARDS, process_group=ranks.group)
        if "weights" in state:
            # Safetensors stores no strides and no sharing, so neither may a tensor have them.
            save_file({k: v.detach().contiguous() for k, v in state["weights"].items()}, partial / WEIGHTS)

    def finish() -> None:
        save_recipe(recipe, partial / "recipe.json")
        torch.save(state["trainer"], partial / TRAINER)
        if "weights" in state:
            as_new(partial / WEIGHTS)
        for path in (*partial.rglob("*"), partial):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)  # the name appears only when the content is complete
        flush(folder.parent)  # and is on the disk before an older checkpoint goes
        for old in checkpoints(run)[: -recipe.run.keep]:
            shutil.rmtree(old)

    for does, part in ((ranks.first, prepare), (True, write), (ranks.first, finish)):
        error = None
        try:
            if does:
                part()
        except (OSError, RuntimeError, SafetensorError, dcp.CheckpointException) as problem:
            error = f"{folder} could not be written: {problem}; the checkpoints before it are whole"
        if words := ranks.told(error):
            raise CheckpointError(words)
    return folder


def _states(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def sharded(model: nn.Module) -> bool:
    """Whether this process has but a part of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def load(folder: Path, model: CLIP, optimizer: Optimizer) -> dict:
    """Load a checkpoint, at any number of processes; returns the trainer's counters and random states.

    Raises:
        CheckpointError: a file is missing or truncated.
    """
    state = load_trainer(folder)
    if (folder / SHARDS).is_dir():
        states = _states(model, optimizer)
        try:
            dcp.load(states, checkpoint_id=folder / SHARDS)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            raise CheckpointError(f"{folder / SHARDS} cannot be read: {error}; an older one may be whole") from error
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    else:
        try:
            load_checkpoint(model, folder / WEIGHTS)
        except UnreadableError as error:
            raise CheckpointError(f"{error}; an older one may be whole") from error
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            values = state["optimizer"]["state"].get(number, {})
            for key, value in values.items():
                if value.shape == parameter.shape:
                    values[key] = part_of(value, parameter)
        optimizer.load_state_dict(state["optimizer"])
    return state


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".partial")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one checkpoint, and not a run with several."""
    return (path / WEIGHTS).is_file() or (path / SHARDS).is_dir()


def latest(path: Path) -> Path:
    """The checkpoint folder that a run folder, or a checkpoint folder, stands for.

    Raises:
        CheckpointError: there is none; says what was looked for.
    """
    if is_checkpoint(path):
        return path
    found = checkpoints(path)
    if not found:
        if path.is_file():
            raise CheckpointError(f"{path} is a file; give the folder that `evaclip export {path} FOLDER` makes of it")
        what = "has no checkpoints" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give a folder that `evaclip train` wrote, or one of its checkpoints/step-*"
        )
    return found[-1]


def load_trainer(folder: Path) -> dict:
    """The trainer's own state: counters, random generators, and where parameters are not sharded the optimizer."""
    path = folder / TRAINER
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this checkpoint can be evaluated, but not continued") from None
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read, it may be truncated ({error}); an older one may be whole"
        ) from error
