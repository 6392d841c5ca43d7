"""Checkpoints of a run: written whole or not at all, kept in small number, loaded strictly.

<run>/recipe.json
<run>/checkpoints/step-00000500/{recipe.json, model.safetensors, trainer.pt}
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from evaclip.train.recipe import Recipe, save_recipe


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, truncated or of another run; the message names the file."""


def save(run: Path, recipe: Recipe, model: nn.Module, trainer: dict, step: int, keep: int) -> Path:
    """Write the checkpoint of a step and drop all but the newest `keep`."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    partial = folder.with_name(folder.name + ".partial")
    for unfinished in folder.parent.glob("*.partial"):
        shutil.rmtree(unfinished)
    partial.mkdir(parents=True)
    save_recipe(recipe, partial / "recipe.json")
    # Safetensors stores no strides and no sharing, so neither may a tensor have them.
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, partial / "model.safetensors")
    torch.save(trainer, partial / "trainer.pt")
    for file in partial.iterdir():
        _flush(file)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)  # the name appears only when the content is complete
    _flush(folder.parent)  # and is on the disk before an older checkpoint goes
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".partial")


def latest(path: Path) -> Path:
    """The checkpoint folder that a run folder, or a checkpoint folder, stands for.

    Raises:
        CheckpointError: there is none; says what was looked for.
    """
    if (path / "model.safetensors").is_file():
        return path
    found = checkpoints(path)
    if not found:
        what = "has no checkpoints" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give a folder that `evaclip train` wrote, or one of its checkpoints/step-*"
        )
    return found[-1]


def load_trainer(folder: Path) -> dict:
    """The trainer's own state: optimizer, random generators, counters."""
    path = folder / "trainer.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this checkpoint can be evaluated, but not continued") from None
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read, it may be truncated ({error}); an older one may be whole"
        ) from error
