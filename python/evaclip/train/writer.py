"""Who writes a run's checkpoints: the trainer itself, or a thread while it trains on."""

from concurrent import futures
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip.device import one_thread
from evaclip.train import checkpoint
from evaclip.train.ranks import Ranks
from evaclip.train.recipe import Recipe


class Writer:
    """Writes checkpoints one after the other; in the background, of a copy in the CPU's memory.

    All processes of a run must build it, and call `save` and `wait` at the same steps.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, device: torch.device):
        self.recipe, self.ranks = recipe, ranks
        self.pool: futures.Executor | None = None
        self.pending: futures.Future | None = None
        if recipe.run.async_checkpoints:
            self.pool = one_thread("evaclip-writer", device)
            if ranks.group is not None:  # one of its own: what the thread exchanges must not meet what steps do
                patience = timedelta(minutes=recipe.compute.timeout)
                self.ranks = ranks._replace(group=dist.new_group(backend="gloo", timeout=patience))

    def save(self, run: Path, state: dict[str, Any]) -> None:
        """Write a `checkpoint.state_of`; in the background, when the one before is written.

        Raises:
            CheckpointError: this one could not be written, or in the background the one before.
        """
        if self.pool is None:
            self._write(run, state)
        else:
            self.wait()
            self.pending = self.pool.submit(self._write, run, _copied(state))

    def _write(self, run: Path, state: dict[str, Any]) -> None:
        folder = checkpoint.save(run, self.recipe, state, self.ranks)
        if self.ranks.world > 1 and self.ranks.first:  # where a process dies, NCCL leaves the others no last word
            with suppress(OSError):  # the checkpoint is whole though nobody reads of it
                print(f"saved {folder}", flush=True)

    @property
    def failed(self) -> bool:
        """Whether this process knows that the checkpoint under way was not written; `wait` tells why."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Until the last checkpoint is written; raises its CheckpointError, which is the same on all processes."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish what is under way, whatever becomes of it."""
        if self.pending is not None:
            futures.wait([self.pending])


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(v) for key, v in value.items()}
    return type(value)(map(_copied, value)) if isinstance(value, list | tuple) else value
