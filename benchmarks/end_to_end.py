"""A whole training step: evaclip's model, loss and optimizer against open_clip's, eager and compiled.

`python -m benchmarks --family end_to_end` on one device; `torchrun --nproc-per-node N -m benchmarks.end_to_end
[--quick]` on several, with each way to spread the model over them.

A step has images and captions at hand and does what the trainers do with them: both towers, the loss of the whole
batch, backward passes, the clip of the gradients and the update. FLOP are those of `evaclip.flops`, of matrix products
without anything computed twice; the share is of the rate of one large product in the same run.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from itertools import count, groupby
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import evakernels as ek
from benchmarks import harness, roofline
from evaclip import flops
from evaclip.models import configure
from evaclip.train.graph import step_of
from evaclip.train.model import build_model
from evaclip.train.ranks import Ranks, join, leave
from evaclip.train.recipe import Compute, Data, Model, Optimizer, Recipe

CLIP_GRAD_NORM = 5.0


class Case(NamedTuple):
    """A model, a batch and the share of patches dropped; some layers of both towers alone, where not all."""

    model: str
    batch: int
    drop: float
    layers: int | None = None
    peer: str | None = None  # open_clip's name of the model

    def __str__(self) -> str:
        some = f", {self.layers} layers of each tower" if self.layers else ""
        return f"{self.model}{some}, batch {self.batch}{f', {self.drop:.0%} of patches dropped' if self.drop else ''}"

    def shrunk(self) -> dict[str, Any]:
        return {tower: {"layers": self.layers} for tower in ("vision", "text")} if self.layers else {}

    def work(self) -> int:
        config = configure(self.model, **self.shrunk())
        return self.batch * flops.training(config, config.vision.tokens(self.drop))


ON_GPU = (
    Case("EVA02-CLIP-B-16", 512, 0.5, peer="EVA02-B-16"),
    Case("EVA02-CLIP-L-14", 128, 0.5, peer="EVA02-L-14"),
    Case("EVA02-CLIP-L-14", 64, 0.0, peer="EVA02-L-14"),
    Case("EVA-CLIP-18B", 64, 0.5, layers=4),
)
ON_CPU = (
    Case("EVA02-CLIP-B-16", 8, 0.5, peer="EVA02-B-16"),
    Case("EVA02-CLIP-B-16", 8, 0.0, peer="EVA02-B-16"),
    Case("EVA02-CLIP-L-14", 8, 0.5, layers=4, peer="EVA02-L-14"),
)
QUICK = (Case("EVA02-CLIP-B-16", 4, 0.5, layers=1, peer="EVA02-B-16"),)
CASES = {"cuda": ON_GPU, "cpu": ON_CPU}


def batch_of(case: Case, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """This process's images and captions."""
    config, share = configure(case.model), ranks.share(case.batch)
    own = share.stop - share.start
    torch.manual_seed(ranks.rank)
    images = torch.randn(own, config.vision.channels, *config.vision.image, device=harness.device())
    ids = torch.randint(1, config.text.vocabulary - 1, (own, config.text.context), device=harness.device())
    ids[:, -1] = config.text.vocabulary - 1  # the largest id ends a caption
    return images, ids


def recipe(case: Case, **compute: Any) -> Recipe:
    precision = "amp_bf16" if harness.device().type == "cuda" else "fp32"
    return Recipe(
        model=Model(name=case.model, **case.shrunk()),
        data=Data(batch_size=case.batch, patch_drop=case.drop),
        optimizer=Optimizer(clip_grad_norm=CLIP_GRAD_NORM),
        compute=Compute(precision=precision, **compute),  # type: ignore[arg-type]
    )


def evaclips(case: Case, ranks: Ranks, **compute: Any) -> Callable[[], object] | str:
    """A step as `evaclip train` takes it, with fields of its `compute`; the model is built at the first call."""
    if compute.get("compile") and isinstance(why := harness.compiled(nn.Identity()), str):
        return why

    @functools.cache
    def ready() -> tuple:
        torch.manual_seed(0)
        given = recipe(case, **compute)
        model = build_model(given, harness.device(), ranks)
        return model.config.vision, step_of(given, model, ranks, harness.device()), *batch_of(case, ranks)

    steps = count()

    def step() -> Tensor:
        vision, take, images, ids = ready()
        kept = None
        if case.drop:
            first = next(steps) * case.batch + ranks.share(case.batch).start
            keep, where = vision.tokens(case.drop) - 1, images.device
            kept = ek.sample_kept_tokens(len(images), vision.patches, keep, seed=0, offset=first, device=where)
        return take(images, ids, kept)["loss"]

    return step


def open_clip_model(open_clip: ModuleType, case: Case) -> nn.Module:
    torch.manual_seed(0)
    options = {"force_patch_dropout": case.drop, "pretrained_text": False}
    model = open_clip.create_model(case.peer, device=harness.device(), **options)
    if case.layers:
        model.visual.trunk.blocks = model.visual.trunk.blocks[: case.layers]
        model.text.transformer.resblocks = model.text.transformer.resblocks[: case.layers]
    return model.train()


def open_clips(case: Case, ranks: Ranks, compiled: bool = False) -> Callable[[], object] | str:
    """A step as open_clip's trainer takes it, with its AdamW; the model is built at the first call."""
    open_clip = harness.peer("open_clip")
    if isinstance(open_clip, str):
        return open_clip
    if case.peer is None:
        return "open_clip has no such model"
    if compiled and isinstance(why := harness.compiled(nn.Identity()), str):
        return why

    @functools.cache
    def ready() -> tuple:
        model = open_clip_model(open_clip, case)
        module = model if ranks.group is None else DistributedDataParallel(model)
        module = torch.compile(module) if compiled else module
        loss = open_clip.loss.ClipLoss(
            local_loss=True, gather_with_grad=True, cache_labels=True, rank=ranks.rank, world_size=ranks.world
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
        return module, loss, optimizer, *batch_of(case, ranks)

    def step() -> Tensor:
        module, loss_of, optimizer, images, ids = ready()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = loss_of(*module(images, ids)[:3])
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def providers(case: Case, ranks: Ranks) -> harness.Providers:
    if ranks.world > 1:
        names = {"ddp": "DDP", "fsdp": "FSDP2", "fsdp2": "FSDP2, whole until backward"}
        ours = {f"evaclip, {name}": evaclips(case, ranks, parallel=key) for key, name in names.items()}
        return {**ours, "open_clip, DDP": open_clips(case, ranks)}
    graph = {"evaclip, CUDA graph": evaclips(case, ranks, cuda_graph=True)} if harness.device().type == "cuda" else {}
    return {
        "evaclip": evaclips(case, ranks),
        "evaclip, torch.compile": evaclips(case, ranks, compile=True),
        **graph,
        "open_clip": open_clips(case, ranks),
        "open_clip, torch.compile": open_clips(case, ranks, compiled=True),
    }


def rows(quick: bool, ranks: Ranks = Ranks()) -> Iterator[dict]:  # noqa: B008  an immutable tuple
    """Each model's step, by all providers."""
    device = harness.device().type
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peak = roofline.rates(quick)["matmul_tflop_s"] * 1e12 * ranks.world
    processes = f", {ranks.world} processes" if ranks.world > 1 else ""
    for case in QUICK if quick else CASES[device]:
        found = providers(case, ranks)
        options: dict[str, Any] = {"flops": case.work(), "samples": case.batch, "by_host": True}
        options["rounds"] = 1 if quick else 30 if device == "cuda" else 5
        for row in harness.compare("end_to_end", f"{case}{processes}", dtype, "training step", found, **options):
            if row["p50_us"] != "":
                row["share_of_matmul"] = round(case.work() / (row["p50_us"] / 1e6) / peak, 4)
            yield row


def main() -> None:
    """The steps of several processes, as torchrun starts them; the first prints."""
    ranks, _ = join("auto", minutes=10)
    for _, case in groupby(rows("--quick" in sys.argv[1:], ranks), key=lambda row: row["shape"]):
        found = list(case)
        if ranks.first:
            harness.show(found)
    leave()


if __name__ == "__main__":
    main()
