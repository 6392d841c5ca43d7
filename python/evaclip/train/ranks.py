"""The processes of a run: one, or those that torchrun starts."""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from evaclip.data.common import share
from evaclip.device import pick_device


class Ranks(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    world: int = 1
    group: "dist.ProcessGroup | None" = None  # None where there is one process

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """This process's samples of a batch, shares differing by at most one."""
        return share(batch, self.rank, self.world)

    def sizes(self, batch: int) -> list[int] | None:
        """The sizes of all shares, None where there is one process."""
        if self.group is None:
            return None
        parts = (share(batch, rank, self.world) for rank in range(self.world))
        return [part.stop - part.start for part in parts]

    def worst(self, code: int, device: torch.device) -> int:
        """The largest of a number over all processes: how they agree to stop, say."""
        if self.group is None:
            return code
        number = torch.tensor(code, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
        return int(number)

    def told(self, words: str | None) -> str | None:
        """What the first process that has anything to say says, the same for all."""
        return next((word for word in self.all(words) if word), None)

    def all(self, value) -> list:
        """A value of each process, by rank."""
        values = [value]
        if self.group is not None:
            values *= self.world
            dist.all_gather_object(values, value, self.group)
        return values


ALONE = Ranks()


def join(device: str, minutes: float) -> tuple[Ranks, torch.device]:
    """Take this process's place in the run, and its device.

    Args:
        device: as the recipe names it; "cuda" and "auto" are the GPU of torchrun's LOCAL_RANK.
        minutes: how long a collective may wait for a process before the run ends with an error.

    Raises:
        ValueError: no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    found = pick_device(device)
    if found.type == "cuda":
        if found.index is None:
            own = os.environ.get("LOCAL_RANK", 0) if world > 1 else torch.cuda.current_device()
            found = pick_device(f"cuda:{own}")
        torch.cuda.set_device(found)
    if world == 1:
        return Ranks(), found
    if not dist.is_initialized():
        backend, patience = "nccl" if found.type == "cuda" else "gloo", timedelta(minutes=minutes)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store outlives processes that are restarted: they must not meet addresses of the dead there.
            store, rank, world = next(rendezvous("env://", timeout=patience))
            store = dist.PrefixStore(f"restart {restarts()}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
        else:
            dist.init_process_group(backend, timeout=patience)
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), found


def restarts() -> int:
    """How often torchrun has restarted this process, because one of its server failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def leave() -> None:
    """Give the process's place up, so that the interpreter ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()


class RankError(RuntimeError):
    """Another process of the run died, or did not answer in time."""


def lost(ranks: Ranks, error: RuntimeError, checkpoints: list[Path]) -> RankError | None:
    """An error of a collective in words that help; None where the error is another."""
    words = str(error)
    if ranks.group is None or not (isinstance(error, dist.DistError) or "gloo" in words or "NCCL" in words):
        return None
    kept = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
    return RankError(
        f"rank {ranks.rank} of {ranks.world} on {socket.gethostname()} lost another process, which died or did not "
        f"answer within compute.timeout (torchrun names it); {kept} ({words.splitlines()[0]})"
    )
