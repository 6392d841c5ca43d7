"""The losses with their backward passes: a whole batch against the dense formula, and one rank's share of a batch
against open_clip's losses and Inf-CL; time, and on the CPU peak resident memory.

One device measures the share of one rank of many (`benchmarks.simulated`): the others' features are copies of its own,
and their transport takes no time, in evakernels as in the peers.
"""

import functools
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels
from benchmarks import harness, simulated
from evakernels import dispatch
from evakernels.ops.contrastive import reference, streamed

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


def ours(which: str) -> Callable:
    """evakernels' loss on the first of some ranks, with its gradients."""

    def run(image: Tensor, text: Tensor, scale: Tensor, ranks: int) -> tuple[Tensor, ...]:
        image, text, b = image.detach(), text.detach(), len(image)
        tiles = dispatch.choose("contrastive", f"{which}_with_gradients", (image, text))
        lay = streamed.laid_out(simulated.one_of(ranks), [b] * ranks, b, image)
        if which == "contrastive":
            return streamed.contrastive(tiles, image, text, scale.detach(), 0.0, lay, (True, True))[2:]
        return streamed.sigmoid(tiles, image, text, scale.detach(), BIAS.to(scale), lay, (True, True))[1:]

    return run


def open_clips(name: str, **flags) -> Callable:
    """A loss of open_clip on the first of some ranks, with its gradients."""

    def run(image: Tensor, text: Tensor, scale: Tensor, ranks: int) -> tuple[Tensor, ...]:
        module = harness.peer("open_clip.loss")
        if isinstance(module, str):
            raise RuntimeError(module)
        loss = getattr(module, name)(rank=0, world_size=ranks, **flags)
        with (
            mock.patch.object(module, "gather_features", lambda *x, **_: [y.repeat(ranks, 1) for y in x[:2]]),
            mock.patch.object(torch.distributed.nn, "all_gather", lambda x: [x] * ranks),
        ):
            bias = BIAS.to(scale).requires_grad_()
            scalars = (scale, bias) if name == "SigLipLoss" else (scale,)
            return torch.autograd.grad(loss(image, text, *scalars), (image, text, *scalars))

    return run


def inf_cl(image: Tensor, text: Tensor, scale: Tensor, ranks: int) -> tuple[Tensor, ...]:
    """Inf-CL's loss on the first of some ranks, with its gradients; its kernels run on GPUs alone."""
    module = harness.peer("inf_cl")
    if isinstance(module, str):
        raise RuntimeError(module)
    everyones, head = [x.repeat(ranks, 1) for x in (text, image)], math.gcd(image.shape[1], 256)
    pairs = zip((image, text), everyones, strict=True)
    losses = [module.cal_flash_loss(*pair, scale=scale, head_dim=head).mean() for pair in pairs]
    return torch.autograd.grad(sum(losses) / 2, (image, text, scale))


BIAS = torch.tensor(-10.0)
# By the loss, then by the provider.
SHARES = {
    "contrastive": {
        "evakernels": ours("contrastive"),
        "open_clip, local loss": open_clips("ClipLoss", local_loss=True, gather_with_grad=True),
        "Inf-CL": inf_cl,
    },
    "sigmoid": {"evakernels": ours("sigmoid"), "open_clip, SigLIP": open_clips("SigLipLoss", dist_impl="gather")},
}
# (batch, width, ranks): a node, 32 GPUs, EVA02-CLIP-L's run, EVA-CLIP-8B's.
RANKS = (4096, 512, 8), (32768, 1024, 32), (131072, 768, 128), (178176, 1280, 384)


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
    for which, (batch, width, ranks) in itertools.product(SHARES, RANKS[:1] if quick else RANKS):
        yield from one_rank(which, batch, width, ranks, quick)


def one_rank(which: str, batch: int, width: int, ranks: int, quick: bool) -> Iterator[dict]:
    """On a GPU by the harness; on a CPU one call, each in a process of its own, which also tells its memory."""
    case = f"{shape(batch, width)}, 1 of {ranks} ranks", torch.float32, f"{which}, {MODE}"
    tensors = inputs(batch // ranks, width)
    work = (8 if which == "contrastive" else 6) * batch // ranks * batch * width
    providers = {name: functools.partial(run, *tensors, ranks) for name, run in SHARES[which].items()}
    if harness.device().type != "cpu":
        yield from harness.compare("contrastive", *case, providers, flops=work, quick=quick)
        return
    absent = {"Inf-CL": "its kernels run on GPUs alone"}
    names = {name: absent.get(name, lambda: None) for name in providers}
    rows = []
    for row in harness.compare("contrastive", *case, names, flops=work, quick=True, seconds=0):
        if not row["absent"]:
            milliseconds, peak = measured_alone(f"{which}/{row['provider']}", batch, width, ranks)
            row |= dict.fromkeys(("p20_us", "p50_us", "p80_us"), round(milliseconds * 1e3, 2))
            row |= {"peak_mb": peak, "host_us": ""}
        rows.append(row)
    yield from rows
    yield from (row | {"mode": f"{row['mode']}, memory above the inputs"} for row in rows)


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
def measured_alone(provider: str, batch: int, width: int, ranks: int = 0) -> tuple[float, float]:
    """Milliseconds and peak MB above the inputs of one call, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_contrastive", provider, *map(str, (batch, width, ranks))]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return tuple(json.loads(answer.stdout.splitlines()[-1]))


def resident(field: str) -> float:
    """VmRSS, what is resident now, or VmHWM, its maximum since it was last reset; MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def measure_here(provider: str, batch: int, width: int, ranks: int) -> tuple[float, float]:
    def of(batch: int) -> Callable[[], object]:
        if not ranks:
            return calling(LOSSES[provider], *inputs(batch, width))
        which, name = provider.split("/")
        return functools.partial(SHARES[which][name], *inputs(max(1, batch // ranks), width), ranks)

    of(64)()  # libraries load and take their workspaces
    run = of(batch)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before, began = resident("VmRSS"), time.perf_counter()
    gradients = run()
    milliseconds = (time.perf_counter() - began) * 1e3
    assert len(gradients) >= 3
    return milliseconds, round(resident("VmHWM") - before, 1)


if __name__ == "__main__":
    print(json.dumps(measure_here(sys.argv[1], *map(int, sys.argv[2:]))))
