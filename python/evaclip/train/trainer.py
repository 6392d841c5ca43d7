"""The training loop: data in counter order, one step after the other, nothing hidden."""

import dataclasses
import math
import resource
import signal
import sys
import time
from bisect import bisect
from pathlib import Path

import torch

import evakernels as ek
from evaclip import flops
from evaclip.data.common import DataError, extra
from evaclip.gpus import gpu_of
from evaclip.train import checkpoint
from evaclip.train.feed import Feed
from evaclip.train.graph import step_of
from evaclip.train.log import Rows, RunLog
from evaclip.train.loss_scale import LossScale
from evaclip.train.model import build_model, start
from evaclip.train.optim import set_learning_rate, warmup_cosine
from evaclip.train.ranks import Ranks, join, lost
from evaclip.train.recipe import Recipe, RecipeError, Stage, load_recipe, save_recipe
from evaclip.train.source import open_stages
from evaclip.train.step import random_state, set_random_state
from evaclip.train.writer import Writer

OF_STEPS = ("grad_norm", "trust_ratio_min", "trust_ratio_max")  # metrics of steps that were taken


class Trainer:
    """Trains a recipe's model in a folder, from the start or from the folder's last checkpoint.

    The samples, dropped tokens and learning rate of a step are functions of (seed, step) alone, so a run continued
    from any checkpoint takes the same steps as one that was never interrupted; on a CPU bit for bit.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, resume: bool = False):
        self.recipe, self.folder = recipe, folder
        self.ranks, self.device = join(recipe.compute.device, recipe.compute.timeout)
        _check_ranks(recipe, self.ranks, self.device)
        if recipe.run.wandb:
            extra("wandb", "wandb", "run.wandb", group=None)
        if recipe.compute.threads:
            torch.set_num_threads(recipe.compute.threads)
        torch.manual_seed(recipe.run.seed)
        found = checkpoint.latest(folder) if resume else None
        self.model = build_model(recipe, self.device, self.ranks)
        if not found:
            for note in start(self.model, recipe.model):
                if self.ranks.first:
                    print(note)
        self.model.set_checkpointing(recipe.compute.activation_checkpointing)
        if recipe.loss.fixed_logit_scale is not None:
            self.model.logit_scale.requires_grad_(False).fill_(math.log(recipe.loss.fixed_logit_scale))
        self.schedule = dataclasses.replace(recipe.schedule, steps=recipe.steps)
        self.stages = recipe.stages()
        self.source = open_stages(recipe, self.model.config, self.ranks.rank, self.ranks.world)
        self.feed = Feed(self.source, self.device, recipe.steps)
        self.take = step_of(recipe, self.model, self.ranks, self.device)
        self.optimizer = self.take.optimizer
        self.writer = Writer(recipe, self.ranks, self.device)
        self.scale = LossScale()
        if recipe.compute.half == torch.float16:
            self.scale = LossScale(recipe.compute.loss_scale, recipe.compute.loss_scale_window)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.waited = 0.0  # seconds that the last step waited for its batch
        self.stop: str | None = None  # why the run is to end after the step at hand
        self.saving = False
        self.asked = 0.0  # when, by the monotonic clock
        if self.ranks.world > 1:  # all have the same weights, each its own random numbers
            torch.manual_seed(recipe.run.seed + self.ranks.rank)
        if found:
            self._load(found)

    def run(self) -> str:
        """Train to the last step, or until a signal, unusable data or too many skipped steps.

        Returns:
            "finished", or the reason to have stopped early; the state is saved in either case.
        """
        recipe, steps = self.recipe, self.schedule.steps
        self.folder.mkdir(parents=True, exist_ok=True)
        kept, begun = self.folder / "recipe.json", self.step
        log = samples = None
        if self.ranks.first:
            if not kept.exists():
                save_recipe(recipe, kept)
            log = RunLog(self.folder, recipe, self.step)
        if recipe.run.sample_log:
            samples = Rows(self.folder / f"samples-{self.ranks.rank}.jsonl", self.step)
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        saved = self.step
        try:
            self.model.train()
            while self.step < steps and not self._stopping():
                began = time.perf_counter()
                try:
                    metrics = self.train_step()
                except DataError as error:  # of this step nothing has happened yet
                    self.stop = str(error)
                    break
                seconds = time.perf_counter() - began
                if samples:
                    samples.add(self.step - 1, names=self.feed.names)
                if log:
                    if self.step == begun + 1:  # changed options that fail at once are not those to continue with
                        save_recipe(recipe, kept)
                    self._report(log, metrics, seconds)
                if self.step % recipe.run.save_every == 0:
                    self.save()
                    saved = self.step
            if saved != self.step:
                self.save()
            self.writer.wait()
        except (DataError, checkpoint.CheckpointError):
            raise
        except RuntimeError as error:
            raise lost(self.ranks, error, checkpoint.checkpoints(self.folder)) or error from None
        finally:
            self.writer.close()
            for file in (log, samples):
                if file:
                    file.close()
            for s, handler in before.items():
                signal.signal(s, handler)
        return self.stop or "finished"

    def train_step(self) -> dict[str, float | str]:
        """One optimizer step; a non-finite loss or gradient norm leaves weights and optimizer as they were.

        Gradients that overflow though the loss is finite only shrink the loss scale, if there is one.
        """
        recipe = self.recipe
        share = warmup_cosine(self.step, self.schedule)
        set_learning_rate(self.optimizer, share)
        began = time.perf_counter()
        images, ids = self._batch()
        self.waited = time.perf_counter() - began
        kept, scale = self._kept(len(images)), self.scale.value
        tensors = self.take(images, ids, kept, scale, self._stage(self.step).micro_batches)
        values = torch.stack([value.float() for value in tensors.values()]).tolist()  # what waits for the GPU
        metrics: dict = dict(zip(tensors, values, strict=True))
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
        overflow = broken == ["grad_norm"] and self.scale.can_shrink
        if overflow or not broken:
            self.scale.update(overflow)
        if overflow:
            metrics = {name: value for name, value in metrics.items() if name not in OF_STEPS}
        elif broken:
            self.skipped += 1
            self.skipped_in_a_row += 1
            metrics = {"skipped": f"{' and '.join(broken)} not finite"}
            if self.skipped_in_a_row >= recipe.run.max_skipped:
                self.stop = f"{self.skipped_in_a_row} steps in a row were not finite; the last good weights are saved"
        else:
            self.skipped_in_a_row = 0
            metrics["lr"] = recipe.optimizer.visual_lr * share
        if recipe.compute.half == torch.float16 and "skipped" not in metrics:
            metrics |= {"loss_scale": scale, "overflows": self.scale.overflows}
        self.step += 1
        return metrics

    def _stage(self, step: int) -> Stage:
        return self.stages[bisect([stage.first for stage in self.stages], step) - 1]

    def _kept(self, batch: int) -> torch.Tensor | None:
        stage, vision = self._stage(self.step), self.model.config.vision
        drop = stage.patch_drop(self.step)
        if not drop:
            return None
        patches, keep = vision.patches, vision.tokens(drop) - 1
        # The sample's index in the whole run: ids do not depend on micro-batches or on how many processes there are.
        size = self.recipe.data.batch_size
        first = self.step * size + self.ranks.share(size).start
        return ek.sample_kept_tokens(batch, patches, keep, seed=self.recipe.run.seed, offset=first, device=self.device)

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's share of the step's batch; where any process cannot read its own, all raise DataError."""
        trouble = batch = None
        try:
            batch = self.feed.batch(self.step)
        except DataError as error:
            trouble = str(error)
        if self.ranks.worst(int(trouble is not None), self.device):
            raise DataError(self.ranks.told(trouble))
        assert batch is not None
        return batch

    def _stopping(self) -> bool:
        """Whether any process is to stop: a signal may have reached one of them alone.

        Raises:
            CheckpointError: the last checkpoint could not be written in the background.
        """
        worst = self.ranks.worst(2 if self.writer.failed else int(self.stop is not None), self.device)
        if worst == 2:
            self.writer.wait()
        elif worst:
            self.stop = self.ranks.told(self.stop)
        return self.stop is not None

    def _report(self, log: RunLog, metrics: dict, seconds: float) -> None:
        if "skipped" in metrics:
            log.metrics(self.step - 1, **metrics)
            log.say(f"step {self.step - 1} skipped: {metrics['skipped']}")
            return
        if (self.step - 1) % self.recipe.run.log_every == 0 or self.step == self.schedule.steps:
            log.metrics(self.step - 1, **metrics, **self._speed(self.step - 1, seconds), skipped_steps=self.skipped)
        accuracy, rate = 100 * metrics["image_to_text"], self.recipe.data.batch_size / seconds
        log.progress(
            self.step, f"loss {metrics['loss']:.3f}  in-batch accuracy {accuracy:.0f} %  {rate:,.0f} samples/s"
        )

    def _speed(self, step: int, seconds: float) -> dict[str, float]:
        """How fast a step was; MFU where the GPU's rate is known: the formula of docs/planning.md."""
        batch, stage, vision = self.recipe.data.batch_size, self._stage(step), self.model.config.vision
        speed = {"samples_per_second": batch / seconds, "data_wait": self.waited / seconds, "memory_gb": self._memory()}
        gpu = gpu_of(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        if gpu is not None:
            rate = gpu.rate_fp32 if self.recipe.compute.precision == "fp32" else gpu.rate
            tokens = vision.tokens(stage.patch_drop(step))
            work = batch * flops.training(self.model.config, tokens, stage.frames)
            speed["mfu"] = work / seconds / (rate * self.ranks.world)
        return speed

    def _memory(self) -> float:
        """The most memory used so far, GB: tensors on the GPU, or on a CPU the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used * (1 if sys.platform == "darwin" else 1024) / 1e9

    def _on_signal(self, number: int, frame) -> None:
        # A second Ctrl-C does not wait, unless a checkpoint is half written. A SIGTERM comes twice where a scheduler
        # signals every process, and torchrun its own once more; nor do both come from one press of keys.
        if self.stop and number == signal.SIGINT and time.monotonic() > self.asked + 1 and not self.saving:
            raise KeyboardInterrupt
        self.asked = self.asked if self.stop else time.monotonic()
        self.stop = self.stop or signal.Signals(number).name

    def save(self) -> None:
        """Write a checkpoint of everything the next step depends on, now or in the background."""
        trainer = {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "loss_scale": dataclasses.asdict(self.scale),
            "random": self.ranks.all(random_state(self.device)),
        }
        self.saving = True
        try:
            self.writer.save(self.folder, checkpoint.state_of(self.model, self.optimizer, trainer, self.ranks))
        finally:
            self.saving = False

    def _load(self, folder: Path) -> None:
        before, now = load_recipe(str(folder / "recipe.json")), self.recipe
        for key, was, given in (
            ("optimizer.name", before.optimizer.name, now.optimizer.name),
            ("compute.precision", before.compute.precision, now.compute.precision),
        ):
            if was != given:
                raise RecipeError(f"{key} is {given!r}, but {folder} was written with {was!r}; continue with that")
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state = checkpoint.load(folder, self.model, self.optimizer)
        for group, of_this_recipe in zip(self.optimizer.param_groups, options, strict=True):
            group.update(of_this_recipe)  # a state dict brings the options of the run that wrote it along
        self.step, self.skipped, self.skipped_in_a_row = state["step"], state["skipped"], state["skipped_in_a_row"]
        window = self.scale.window
        self.scale = LossScale(**state["loss_scale"])
        self.scale.window = window  # of this recipe
        if len(state["random"]) == self.ranks.world:
            set_random_state(state["random"][self.ranks.rank], self.device)


def _check_ranks(recipe: Recipe, ranks: Ranks, device: torch.device) -> None:
    parts = max(stage.micro_batches for stage in recipe.stages())
    if recipe.data.batch_size < ranks.world * parts:
        raise RecipeError(
            f"data.batch_size is {recipe.data.batch_size}, but {ranks.world} processes with {parts} micro-batches need "
            f"{ranks.world * parts} samples at least"
        )
    shard = recipe.compute.shard
    if shard and ranks.world % shard:
        raise RecipeError(f"compute.shard is {shard}, but {ranks.world} processes cannot be divided into so many each")
    if recipe.compute.cuda_graph and (ranks.world > 1 or device.type != "cuda"):
        what = f"{ranks.world} processes on {device.type}" if ranks.world > 1 else f"a step on {device.type}"
        raise RecipeError(f"compute.cuda_graph captures the step of one process on a GPU, not {what}; set it to false")
