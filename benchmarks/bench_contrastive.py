"""The contrastive loss with its backward pass against the dense formula: time, and on the CPU peak resident memory."""

import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels
from benchmarks import harness
from evakernels.ops.contrastive import reference

MODE = "forward and backward"


def dense(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor]:
    """open_clip's loss on one process."""
    logits = scale * image @ text.t()
    own = torch.arange(len(image), device=image.device)
    return ((F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2,)


def dense_with_accuracies(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """EVA-CLIP's, which also takes the arg-max of both directions."""
    logits = scale * image @ text.t()
    own = torch.arange(len(image), device=image.device)
    accuracies = [(logits.argmax(dim) == own).float().mean() for dim in (1, 0)]
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2, *accuracies


LOSSES = {"evakernels": evakernels.contrastive_loss, "dense": dense, "dense with accuracies": dense_with_accuracies}


def inputs(batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(2, batch, width, device=harness.device())
    image, text = (x.clone().requires_grad_() for x in F.normalize(features, dim=-1).unbind())
    return image, text, torch.tensor(14.3, device=image.device, requires_grad=True)


def calling(loss: Callable, *tensors: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(*tensors)[0], tensors)


def flops(batch: int, width: int) -> int:
    """Four products of 2 FLOP, where the logits fit one tile three."""
    return (6 if batch <= reference.TILE else 8) * batch**2 * width


def shape(batch: int, width: int) -> str:
    return f"batch {batch}, width {width}"


def rows(quick: bool) -> Iterator[dict]:
    """Time for each batch, then memory: each figure of a process of its own, the dense one's up to 16384 only."""
    for batch, width in ((128, 64), (2048, 512)) if quick else ((128, 64), (512, 256), (2048, 512), (8192, 512)):
        tensors = inputs(batch, width)
        for row in harness.compare(
            "contrastive",
            shape(batch, width),
            torch.float32,
            MODE,
            {name: calling(loss, *tensors) for name, loss in LOSSES.items() if batch <= 2048 or "with" not in name},
            flops=flops(batch, width),
            quick=quick,
        ):
            yield row
        del tensors
    if harness.device().type == "cpu":  # on a GPU every row above has its memory
        for batch in (2048, 4096) if quick else (16384, 32768):
            yield from memory(row, batch, 512, dense_too=batch <= 16384)


def memory(like: dict, batch: int, width: int, *, dense_too: bool) -> Iterator[dict]:
    case = {"shape": shape(batch, width), "mode": f"{MODE}, memory above the inputs", "host_us": ""}

    def row(provider: str, milliseconds: float, megabytes: float) -> dict:
        us = round(milliseconds * 1e3, 2)
        times = {"p20_us": us, "p50_us": us, "p80_us": us, "flops": flops(batch, width)}
        return like | case | times | {"provider": provider, "peak_mb": megabytes}

    yield row("evakernels, one call", *measured_alone("evakernels", batch, width))
    if dense_too:
        yield row("dense, one call", *measured_alone("dense", batch, width))
    else:
        _, half = measured_alone("dense", batch // 2, width)
        yield row(f"dense, 4 x that of {batch // 2}", math.nan, 4 * half)


@functools.cache
def measured_alone(provider: str, batch: int, width: int) -> tuple[float, float]:
    """Milliseconds and peak MB above the inputs of one call, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_contrastive", provider, str(batch), str(width)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return tuple(json.loads(answer.stdout.splitlines()[-1]))


def resident(field: str) -> float:
    """VmRSS, what is resident now, or VmHWM, its maximum since it was last reset; MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def measure_here(provider: str, batch: int, width: int) -> tuple[float, float]:
    calling(LOSSES[provider], *inputs(64, width))()  # libraries load and take their workspaces
    run = calling(LOSSES[provider], *inputs(batch, width))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, began = resident("VmRSS"), time.perf_counter()
    gradients = run()
    milliseconds = (time.perf_counter() - began) * 1e3
    assert len(gradients) == 3
    return milliseconds, round(resident("VmHWM") - before, 1)


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
