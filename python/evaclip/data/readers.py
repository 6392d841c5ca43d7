"""Processes that read batches ahead, by step number: what arrives, and in which order, does not depend on them."""

import logging
import mmap
import multiprocessing
import os
import signal
import tempfile
import traceback
from collections import deque
from math import prod
from multiprocessing import connection, reduction
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import torch
from torch import Tensor

from evaclip.data.common import DataError
from evaclip.data.mixture import Mixture, Tally, Unreadable

PATIENCE = 60  # seconds, after which a reader that keeps the run waiting is named

log = logging.getLogger(__name__)


class Readers:
    """Batches of a mixture, read ahead by processes of their own; a source for the trainer.

    Each process reads its part of every batch, in the order of steps, into memory that all share, as uint8. A process
    that dies ends the run with its name.

    Args:
        batches: what to read.
        workers: processes; 0 reads in this one, when asked.
        ahead: batches in memory, the one that is asked for included.
        max_unreadable: share of the samples that may be unreadable; more is an error, from 10 of them on.
    """

    def __init__(self, batches: Mixture, workers: int, *, ahead: int = 3, max_unreadable: float = 0.01):
        self.batches, self.tokenizer = batches, batches.tokenizer
        self.unreadable = Unreadable(max_unreadable)
        self.names: list[str] = []  # of the samples of the last batch
        self._memory = _Memory(batches, ahead if workers else 1)
        self._steps: deque[int] = deque()  # under way, oldest first
        self._replies: dict[int, dict[str, Tally | str]] = {}  # of these, by the reader's name
        self._readers: dict[connection.Connection, BaseProcess] = {}
        # A server that has imported torch once forks each reader in milliseconds; it has no threads, and no GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["evaclip.data.readers"])
        for number in range(workers):
            ours, theirs = context.Pipe()
            name = f"evaclip-reader-{number} of rank {batches.rank}"
            arguments = theirs, batches, self._memory, number, workers
            process = context.Process(target=_serve, args=arguments, name=name, daemon=True)
            process.start()
            theirs.close()
            self._readers[ours] = process
        self.close = Finalize(self, _end, (self._readers,), exitpriority=10)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Pixels (n, *image_shape) uint8 and token ids (n, context) int64 of this rank's part of a step.

        Raises:
            DataError: too much is unreadable, or a reader has died.
        """
        slot = self._memory.slot(step)
        if not self._readers:
            replies: list[Tally | str] = [self.batches.read(step, *slot)]
        else:
            if not self._steps or self._steps[0] != step:
                self._go_to(step)
            self._wait_for(step)
            self._steps.popleft()
            by_name = self._replies.pop(step)
            replies = [by_name[process.name] for process in self._readers.values()]
        self.names = []
        for reply in replies:
            if isinstance(reply, str):
                raise DataError(reply)
            self.unreadable.add(reply)
            self.names += reply.names
        images, ids = (part.clone() for part in slot)
        if self._readers:
            self._ask(step + self._memory.ahead)  # its slot is that of this step
        return images, ids

    def _go_to(self, step: int) -> None:
        while self._steps:  # readers may still be writing
            self._wait_for(self._steps[0])
            self._replies.pop(self._steps.popleft())
        for following in range(step, step + self._memory.ahead):
            self._ask(following)

    def _ask(self, step: int) -> None:
        self._steps.append(step)
        self._replies[step] = {}
        for pipe, process in self._readers.items():
            try:
                pipe.send(step)
            except OSError:
                raise self._death(process) from None

    def _wait_for(self, step: int) -> None:
        replies = self._replies[step]
        while len(replies) < len(self._readers):
            ready = connection.wait(list(self._readers), PATIENCE)
            if not ready:
                late = [p.name for p in self._readers.values() if p.name not in replies]
                log.warning("step %d waits for %s since more than %d s", step, ", ".join(late), PATIENCE)
            for pipe, process in self._readers.items():
                if pipe not in ready:
                    continue
                try:
                    done, reply = pipe.recv()
                except (EOFError, OSError):
                    raise self._death(process) from None
                self._replies[done][process.name] = reply

    def _death(self, process: BaseProcess) -> DataError:
        process.join(1)
        code = process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        hint = "; the machine may have run out of memory: fewer data.workers need less" if code == -9 else ""
        return DataError(f"the process {process.name} (pid {process.pid}) {how}{hint}")


class _Memory:
    """Room for batches, shared with the readers; not in /dev/shm, which is small in containers."""

    def __init__(self, batches: Mixture, ahead: int):
        context = batches.tokenizer([]).shape[1]
        self.images, self.ids, self.ahead = (batches.size, *batches.image_shape), (batches.size, context), ahead
        self.ids_at = -(-prod(self.images) // 8) * 8
        self.slot_bytes = self.ids_at + 8 * prod(self.ids)
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("evaclip-readers")
        else:
            with tempfile.TemporaryFile() as file:
                self.file = os.dup(file.fileno())
        os.ftruncate(self.file, max(1, self.slot_bytes * ahead))
        self.buffer = mmap.mmap(self.file, 0)

    def slot(self, step: int) -> tuple[Tensor, Tensor]:
        """The pixels and token ids of a step, to write and to read."""
        start = step % self.ahead * self.slot_bytes
        images, ids = (
            torch.frombuffer(self.buffer, dtype=dtype, count=prod(shape), offset=start + at).view(shape)
            for dtype, shape, at in ((torch.uint8, self.images, 0), (torch.int64, self.ids, self.ids_at))
        )
        return images, ids

    def __getstate__(self) -> dict:
        return self.__dict__ | {"file": reduction.DupFd(self.file), "buffer": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self.file = state["file"].detach()
        self.buffer = mmap.mmap(self.file, 0)

    def __del__(self) -> None:
        if "file" in self.__dict__:
            os.close(self.file)


def _serve(pipe: connection.Connection, batches: Mixture, memory: _Memory, part: int, parts: int) -> None:
    """Read this part of each step that is asked for, until the other end closes."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the trainer takes its last step before it leaves
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    while True:
        try:
            step = pipe.recv()
        except EOFError:
            return
        reply: Tally | str
        try:
            reply = batches.read(step, *memory.slot(step), part, parts)
        except DataError as error:
            reply = str(error)
        except Exception:
            reply = f"a reader failed:\n{traceback.format_exc()}"
        try:
            pipe.send((step, reply))
        except BrokenPipeError:
            return


def _end(readers: dict[connection.Connection, BaseProcess]) -> None:
    for pipe, process in readers.items():
        process.kill()
        pipe.close()
        process.join()
    readers.clear()
