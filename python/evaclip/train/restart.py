"""The run that a torchrun job goes on with when it has started its processes again."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import torch

from evaclip.train.ranks import Ranks, restarts
from evaclip.train.recipe import Recipe, RecipeError, load_recipe

JOB = "job"  # the file of a run's folder that says which job began it


def mark(folder: Path) -> None:
    """Note in a run's folder which torchrun job began it, if one did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        (folder / JOB).write_text(_job())


def began(recipe: Recipe, ranks: Ranks, device: torch.device) -> Path | None:
    """The folder in which this job's processes began a recipe before torchrun restarted them; None: they began none.

    All processes must call: those of a server where nothing failed do not know of the restart. The first one looks.
    """
    if not ranks.worst(restarts(), device):
        return None
    files = Path(recipe.run.output).glob(f"*/{JOB}") if ranks.first else ()
    # A job that was given the id of an earlier one must not go on with what that one trained.
    folders = [file.parent for file in files if file.read_text() == _job() and _holds(file.parent, recipe)]
    found = ranks.told(str(max(folders, key=lambda folder: (folder / JOB).stat().st_mtime)) if folders else None)
    return Path(found) if found else None


def _holds(folder: Path, recipe: Recipe) -> bool:
    with suppress(RecipeError):
        return load_recipe(str(folder / "recipe.json")) == recipe
    return False


def _job() -> str:
    """A name for the job that its restarts share."""
    given = os.environ["TORCHELASTIC_RUN_ID"]
    # Without --rdzv-id every job is called "none": then it is the one of the torchrun that started the first process.
    return given if given != "none" else f"{socket.gethostname()} {os.getppid()}"
