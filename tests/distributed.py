"""Runs a function in several processes that form a gloo group, and brings back what they return."""

import io
import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

# A server that has imported torch once, and forks a process in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "evakernels"])


def run(function: Callable, size: int, *args, seconds: float = 120) -> list:
    """What `function(*args)` returns in each of `size` processes, by rank.

    Args:
        function: of a module that can be imported, not of a test module.
        args: and results: whatever torch.save takes.

    Raises:
        AssertionError: a process failed or took longer than `seconds`; the message has its traceback.
    """
    with TemporaryDirectory() as folder:
        queue = CONTEXT.SimpleQueue()
        arguments = queue, function, size, str(Path(folder, "store")), seconds, packed(args)
        processes = [CONTEXT.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(size)]
        for process in processes:
            process.start()
        found: dict[int, object] = {}
        end = time.monotonic() + seconds
        try:
            while len(found) < size:
                ended = [p.exitcode for p in processes if p.exitcode]
                if queue.empty():  # a process that is killed leaves no word
                    assert not ended, f"a process of {function.__name__} ended with {ended[0]}"
                    assert time.monotonic() < end, f"{function.__name__} took longer than {seconds} s"
                    time.sleep(0.01)
                    continue
                rank, result, error = queue.get()
                assert not error, f"rank {rank} of {size}:\n{error}"
                found[rank] = unpacked(result)
        finally:
            for process in processes:
                process.kill()
        return [found[rank] for rank in range(size)]


def _rank(rank: int, queue, function: Callable, size: int, store: str, seconds: float, args: bytes) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
        )
        queue.put((rank, packed(function(*unpacked(args))), None))
        dist.destroy_process_group()
    except Exception:
        queue.put((rank, None, traceback.format_exc()))


def packed(value) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def unpacked(value: bytes):
    return torch.load(io.BytesIO(value), weights_only=False)
