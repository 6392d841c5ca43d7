"""What a process of `distributed.run` does."""

import io
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist


def serve(rank: int, queue, function: Callable, size: int, store: str, seconds: float, args: bytes) -> None:
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
