"""Runs a function in several processes that form a gloo group, and brings back what they return."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

import rank

# A server that has imported once what takes seconds, and forks a process in milliseconds. It starts now, before readers
# of batches start one that has imported less.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["evaclip.train.trainer", "sklearn.datasets", "torch._dynamo", "torch.distributed.fsdp"])
forkserver.ensure_running()


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
        arguments = queue, function, size, str(Path(folder, "store")), seconds, rank.packed(args)
        processes = [
            CONTEXT.Process(target=rank.serve, args=(number, *arguments), daemon=True) for number in range(size)
        ]
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
                number, result, error = queue.get()
                assert not error, f"rank {number} of {size}:\n{error}"
                found[number] = rank.unpacked(result)
        finally:
            for process in processes:
                process.kill()
        return [found[number] for number in range(size)]
