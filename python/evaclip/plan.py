"""`evaclip plan`: what a run takes in memory and time on GPUs, before any of them is rented; docs/planning.md.

Everything here is by formula from datasheets. EFFICIENCY, TRAFFIC and RESERVED are assumptions, the rest is counted.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from evaclip import flops, memory
from evaclip.gpus import GPUS, Gpu
from evaclip.models.blocks import Checkpointing
from evaclip.models.clip import CLIP
from evaclip.train.model import build_model
from evaclip.train.recipe import Recipe, load_recipe

Sharding = Literal["ddp", "zero1", "zero2", "zero3"]
SHARDINGS: dict[Sharding, str] = {
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2 / FSDP, weights kept gathered",
    "zero3": "ZeRO-3 / FSDP",
}
EFFICIENCY = 0.7  # of the datasheet's rate, in large matrix products
TRAFFIC = 0.8  # of the datasheet's memory bandwidth, in everything else
PASSES = 5  # over each saved tensor: written, read by what follows, read in backward, its gradient written and read
RESERVED = 1.5e9, 0.05  # bytes for CUDA and NCCL, and the share of the memory that fragments


@dataclass(frozen=True)
class Way:
    """How the work is divided."""

    sharding: Sharding
    checkpointing: Checkpointing
    micro_batches: int = 1


class Estimate(NamedTuple):
    """One step on one GPU."""

    way: Way
    parts: dict[str, float]  # bytes
    computing: float  # seconds in matrix products
    moving: float  # seconds in everything else, bound by memory
    communicating: float  # seconds, under way while computing
    mfu: float
    fits: bool

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Time of the step."""
        return max(self.computing + self.moving, self.communicating)


@dataclass(frozen=True)
class Job:
    """A model, a batch and the GPUs it is divided among."""

    model: CLIP  # on the meta device
    precision: memory.Precision
    batch: int
    gpu: Gpu
    gpus: int
    patch_drop: float = 0.0
    frames: int = 1

    def step(self, way: Way) -> memory.Step:
        """What one GPU computes at once."""
        gathered = way.sharding in ("zero2", "zero3")
        local = self.batch // self.gpus // way.micro_batches
        return memory.Step(local, self.precision, self.patch_drop, self.frames, gathered)

    @cached_property
    def held(self) -> memory.State:
        """Weights and what belongs to them, all of it."""
        return memory.state(self.model)

    @cached_property
    def largest_block(self) -> int:
        """Bytes of the weights of the largest block."""
        blocks = *self.model.visual.blocks, *self.model.text.transformer.resblocks
        return max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks)

    @cached_property
    def flops(self) -> float:
        """FLOP of a step, all GPUs together, as MFU counts them."""
        config = self.model.config
        return self.batch * flops.training(config, config.vision.tokens(self.patch_drop), self.frames)

    @property
    def rate(self) -> float:
        """FLOP/s of all GPUs by their datasheet."""
        return self.gpus * (self.gpu.rate_fp32 if self.precision == "fp32" else self.gpu.rate)


def parts(job: Job, way: Way) -> dict[str, float]:
    """Bytes on one GPU, part by part."""
    config, step, held, ranks = job.model.config, job.step(way), job.held, job.gpus
    compute = step.widths.activation / step.widths.weight  # size of a gathered weight, relative to a stored one
    block = job.largest_block * (compute if way.sharding in ("zero2", "zero3") else 1)
    sharded = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}[way.sharding]
    local = job.batch // ranks
    found = {
        "weights": held.weights / (ranks if sharded >= 2 else 1),
        "gathered": (0, 0, held.weights * compute, 2 * block)[sharded],  # ZeRO-3: this block's and the next one's
        "masters": held.masters / (ranks if sharded else 1),
        "moments": held.moments / (ranks if sharded else 1),
        "gradients": held.gradients / ranks + 2 * block if sharded >= 2 else held.gradients,
        "activations": memory.activations(config, step, checkpointing=way.checkpointing),
        "workspace": memory.workspace(config, step),
        "loss": memory.loss(config, local, ranks),
        # Pixels of this batch and of the next one; float32 where they are encoded.
        "input": (2 * local + 4 * step.batch) * job.frames * config.vision.channels * math.prod(config.vision.image),
        "buffers": held.buffers,
    }
    return {name: float(size) for name, size in found.items()}


def estimate(job: Job, way: Way) -> Estimate:
    """Memory and time of one step."""
    step, config, ranks, gpu = job.step(way), job.model.config, job.gpus, job.gpu
    found = parts(job, way)
    # Forward, twice that backward; once more where blocks are computed again, or features are computed first.
    forwards = 3 + (way.checkpointing == "block") + (way.micro_batches > 1)
    products = job.flops / ranks / 3 * forwards + 8 * job.batch / ranks * job.batch * config.embed_dim
    saved = memory.activations(config, step, checkpointing="none") * way.micro_batches
    again = float(saved * (forwards - 3))
    if way.checkpointing == "selective":
        again += max(0, saved - found["activations"] * way.micro_batches)
    state = found["weights"] + found["masters"] + found["moments"] + found["gradients"]
    traffic = saved * PASSES + 2 * again + 2 * state
    computing = products / (job.rate / ranks * EFFICIENCY)
    moving = traffic / (gpu.bandwidth * TRAFFIC)
    weights, reduced = float(job.held.weights), float(job.held.gradients)
    if step.gathered:  # in the dtype that is computed with; sums in float32
        weights, reduced = (n / step.widths.weight for n in (weights * step.widths.activation, reduced * 4))
    gathers = {"ddp": 0, "zero1": 1, "zero2": 1, "zero3": 2 * way.micro_batches + (way.micro_batches > 1)}[way.sharding]
    scatters = {"ddp": 2, "zero1": 1}.get(way.sharding, way.micro_batches)
    features = 2 * 4 * job.batch * config.embed_dim
    bus = min(gpu.link, gpu.network) if ranks > gpu.per_server else gpu.link
    communicating = (gathers * weights + scatters * reduced + features) * (ranks - 1) / ranks / bus
    seconds = max(computing + moving, communicating)
    fits = sum(found.values()) + RESERVED[0] <= gpu.memory * (1 - RESERVED[1])
    return Estimate(way, found, computing, moving, communicating, job.flops / job.rate / seconds, fits)


def options(job: Job) -> list[Estimate]:
    """Every sharding and checkpointing, each with as few micro-batches as fit, or else as many as go."""
    found = []
    for sharding in SHARDINGS:
        for checkpointing in get_args(Checkpointing):
            local = job.batch // job.gpus
            for micro in (n for n in range(1, local + 1) if local % n == 0):
                one = estimate(job, Way(sharding, checkpointing, micro))
                if one.fits:
                    break
            found.append(one)
    return found


def best(job: Job) -> Estimate | None:
    """The fastest way that fits; of those within 1 % of it that of fewest micro-batches, then the least sharded."""
    fitting = [one for one in options(job) if one.fits]
    fastest = min((one.seconds for one in fitting), default=0.0)
    near = (one for one in fitting if one.seconds <= 1.01 * fastest)
    return min(near, key=lambda one: one.way.micro_batches, default=None)


def jobs(recipe: Recipe, gpu: Gpu, gpus: int) -> list[tuple[Job, int]]:
    """The stages of a recipe as jobs, and the steps of each.

    Raises:
        ValueError: the batch cannot be divided among the GPUs.
    """
    batch, precision = recipe.data.batch_size, recipe.compute.precision
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}; at least 1")
    if batch % gpus:
        raise ValueError(
            f"a batch of {batch:,} cannot be divided among {gpus} GPUs; give a multiple of their number, as "
            f"{max(1, round(batch / gpus)) * gpus:,}"
        )
    model = build_model(recipe, "meta")
    found = []
    for stage in recipe.stages():
        for drop, steps in ((stage.data.patch_drop, stage.end - stage.first - stage.tail), (0.0, stage.tail)):
            if steps:
                found.append((Job(model, precision, batch, gpu, gpus, drop, stage.frames), steps))
    return found


class Published(NamedTuple):
    """A run whose hardware and duration were published."""

    gpu: str
    gpus: int
    hours: float
    source: str


PUBLISHED = {"EVA-CLIP-18B": Published("a100-40g", 360, 600, "arXiv 2402.04252: 6 B samples, 360 A100-40G, 600 hours")}


def report(recipe: Recipe, gpu: str, gpus: int, mfu: float | None = None) -> str:
    """The plan as text: memory of every way, the best one part by part, time and days; and the published run.

    Raises:
        ValueError: no such GPU, or a batch that cannot be divided among them.
    """
    if gpu not in GPUS:
        raise ValueError(f"no GPU {gpu!r}; known: {', '.join(GPUS)}")
    found = jobs(recipe, GPUS[gpu], gpus)
    job, _ = max(found, key=lambda stage: stage[0].flops * stage[1])
    parameters = sum(p.numel() for p in job.model.parameters())
    lines = [
        f"{recipe.model.name}: {parameters:,} parameters, {job.precision}; {job.batch:,} samples on {gpus} x {gpu}, "
        f"{job.batch // gpus:,} each, {_seen(job)}; by formula, see docs/planning.md",
        "",
        "{:40s} {:>11s} {:>6s} {:>8s} {:>8s} {:>7s}".format("", "checkpoints", "parts", "GB/GPU", "s/step", "MFU"),
    ]
    for one in options(job):
        time = f"{one.seconds:8.2f} {100 * one.mfu:5.1f} %" if one.fits else "does not fit"
        where = f"{SHARDINGS[one.way.sharding]:40s} {one.way.checkpointing:>11s} {one.way.micro_batches:6d}"
        lines.append(f"{where} {one.memory / 1e9:8.1f} {time}")
    chosen = [(best(job), job, steps) for job, steps in found]
    main = best(job)
    if main is None:
        return "\n".join([*lines, "", "nothing fits: more GPUs, a smaller batch, or GPUs with more memory\n"])
    lines += ["", f"best: {_described(main.way)}; GB per GPU:"]
    lines += [f"  {name:12s} {size / 1e9:8.2f}" for name, size in main.parts.items() if size]
    lines += [
        f"a step: {main.computing:.2f} s in matrix products, {main.moving:.2f} s bound by memory; "
        f"{main.communicating:.2f} s of communication meanwhile",
        "",
    ]
    for way, of, steps in chosen if len(found) > 1 else ():
        how = f"{way.seconds:.2f} s each, {way.memory / 1e9:.1f} GB, {_described(way.way)}" if way else "nothing fits"
        lines.append(f"{steps:,} steps, {_seen(of)}: {how}")
    return "\n".join(lines + _duration(found, mfu) + _published(recipe)) + "\n"


def _seen(job: Job) -> str:
    vision = job.model.config.vision
    frames = f"{job.frames} frames of " if job.frames > 1 else ""
    return f"{frames}{vision.tokens(job.patch_drop)} of {vision.tokens()} tokens"


def _described(way: Way) -> str:
    checks = {"none": "without", "block": "with", "selective": "with selective"}[way.checkpointing]
    parts = f", {way.micro_batches} micro-batches" if way.micro_batches > 1 else ""
    return f"{SHARDINGS[way.sharding]}, {checks} activation checkpointing{parts}"


def total(found: list[tuple[Job, int]]) -> tuple[float, float] | None:
    """FLOP and seconds of a whole run, each stage in the way that is best for it; None where one does not fit."""
    work = seconds = 0.0
    for job, steps in found:
        one = best(job)
        if one is None:
            return None
        work, seconds = work + job.flops * steps, seconds + one.seconds * steps
    return work, seconds


def _duration(found: list[tuple[Job, int]], mfu: float | None) -> list[str]:
    job, steps = found[0][0], sum(n for _, n in found)
    whole = total(found)
    if whole is None:
        return ["a phase does not fit"]
    work, seconds = whole
    lines = [
        f"run: {steps:,} steps, {steps * job.batch:,} samples, {work:.2e} FLOP: {seconds / 86400:.1f} days, "
        f"MFU {100 * work / job.rate / seconds:.1f} %"
    ]
    if mfu is not None:
        lines.append(f"at an MFU of {100 * mfu:.0f} %: {work / job.rate / mfu / 86400:.1f} days")
    return lines


def _published(recipe: Recipe) -> list[str]:
    run = PUBLISHED.get(recipe.model.name)
    if run is None:
        return []
    found = jobs(load_recipe(recipe.model.name), GPUS[run.gpu], run.gpus)
    whole = total(found)
    if whole is None:
        return []
    work, seconds = whole
    implied = work / found[0][0].rate / (run.hours * 3600)
    return [
        "",
        f"the published run of {recipe.model.name} ({run.source}), by its recipe {work:.2e} FLOP:",
        f"  published {run.hours:5.0f} hours, MFU {100 * implied:.1f} %",
        f"  estimated {seconds / 3600:5.0f} hours, MFU {100 * work / found[0][0].rate / seconds:.1f} %",
    ]


@dataclass(frozen=True, kw_only=True)
class Planning:
    """What `evaclip plan MODEL` can be told; what is left out is the recipe's, where MODEL has one."""

    gpus: int = 8
    """GPUs in all."""
    gpu: str = "a100-40g"
    """a100-40g, a100-80g, h100 or h200."""
    batch: int | None = None
    """Samples per step, over all GPUs."""
    precision: memory.Precision | None = None
    """As compute.precision."""
    patch_drop: float | None = None
    """Share of the patches left out, in all of the run."""
    samples: int | None = None
    """Samples of the run; its phases then fall away."""
    mfu: float | None = None
    """Also tell the days at this share of the datasheet's rate."""


def planned(recipe: Recipe, options: Planning) -> Recipe:
    """The recipe with what the command line gives; ValueError where it cannot be."""
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu is {options.mfu}; above 0, at most 1: 0.4 are 40 %")
    data, schedule, phases, compute = recipe.data, recipe.schedule, recipe.phase, recipe.compute
    if options.batch is not None:
        data = dataclasses.replace(data, batch_size=options.batch)
    samples = options.samples
    if options.patch_drop is not None:
        data, phases = dataclasses.replace(data, patch_drop=options.patch_drop, undropped_tail=0.0), ()
        samples = samples or sum(phase.samples for phase in recipe.phase)
    if samples:
        schedule, phases = dataclasses.replace(schedule, samples=samples, steps=0), ()
    precision = options.precision or compute.precision
    compute = dataclasses.replace(compute, micro_batches=1, precision=precision)
    phases = tuple(dataclasses.replace(phase, micro_batches=None) for phase in phases)
    return dataclasses.replace(recipe, data=data, schedule=schedule, compute=compute, phase=phases)
