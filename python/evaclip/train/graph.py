"""A training step as a CUDA graph: the host launches one graph where it would launch thousands of kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evaclip.models.clip import CLIP
from evaclip.train.optim import build_optimizer
from evaclip.train.parallel import spread
from evaclip.train.ranks import Ranks
from evaclip.train.recipe import Recipe
from evaclip.train.step import Step

WARM_UP = 3  # steps taken as they are before one is captured: libraries set themselves up, kernels are compiled


def step_of(recipe: Recipe, model: CLIP, ranks: Ranks, device: torch.device) -> "Step | Graphed":
    """A recipe's step of a model, which is spread over the processes, by an optimizer that is built for it."""
    forward = spread(model, recipe.compute, ranks, device)
    optimizer = build_optimizer(model, recipe.optimizer, capturable=recipe.compute.cuda_graph)
    step = Step(model, forward, optimizer, recipe, ranks)
    return Graphed(step, device) if recipe.compute.cuda_graph else step


class Graphed:
    """A `Step` on one GPU that is captured once its inputs have kept their shapes for some steps, then replayed.

    Steps before and after are the same ones, so a run does not depend on when it was captured; when shapes change (no
    patches are dropped any more, videos follow) it begins anew. Learning rates and the loss scale are tensors on the
    device, float32, that are filled before each step. What is returned is overwritten by the next step.
    """

    def __init__(self, step: Step, device: torch.device):
        self.step, self.optimizer, self.groups = step, step.optimizer, step.optimizer.param_groups
        self.stream = torch.cuda.Stream(device)  # nothing can be captured on the default stream
        self.numbers = torch.zeros(1 + len(self.groups), device=device)
        self.inputs: tuple = ()
        self.taken = 0  # with inputs of these shapes
        self.replay: Callable[[], dict] | None = None

    def __call__(
        self,
        images: Tensor,
        ids: Tensor,
        kept: Tensor | None,
        loss_scale: float = 1.0,
        micro_batches: int | None = None,
    ) -> dict:
        """As `Step`; of micro-batches there is one."""
        given = images, ids, kept
        if [*map(_kind, given)] != [*map(_kind, self.inputs)]:
            self.replay = None  # first, so that its memory is free
            self.inputs, self.taken = tuple(None if x is None else torch.empty_like(x) for x in given), 0
        for own, x in zip(self.inputs, given, strict=True):
            if own is not None and x is not None:
                own.copy_(x)
        self.numbers.copy_(torch.tensor([loss_scale, *(group["lr"] for group in self.groups)]))
        self.taken += 1
        if self.replay is None and self.taken > WARM_UP:
            self.replay = captured(self._take, self.stream)
        if self.replay is not None:
            return self.replay()
        now = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            metrics = self._take()
        now.wait_stream(self.stream)
        return metrics

    def _take(self) -> dict:
        images, ids, kept = self.inputs
        loss_scale, *rates = self.numbers.unbind()
        before = [group["lr"] for group in self.groups]
        for group, rate in zip(self.groups, rates, strict=True):
            group["lr"] = rate
        try:
            return self.step(images, ids, kept, loss_scale)
        finally:
            for group, rate in zip(self.groups, before, strict=True):
                group["lr"] = rate  # numbers again, for checkpoints


def captured(function: Callable[[], Any], stream: torch.cuda.Stream) -> Callable[[], Any]:
    """Record what a function launches, without running it; the result launches that and returns the same tensors."""
    graph = torch.cuda.CUDAGraph()
    # "thread_local": other threads read data and write checkpoints meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = function()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def _kind(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.shape, x.dtype)
