"""What a run tells while it goes: a progress bar, metrics.jsonl, TensorBoard, Weights & Biases."""

import dataclasses
import json
import sys
import time
from pathlib import Path

from evaclip.data.common import extra
from evaclip.files import write_text
from evaclip.train.recipe import Recipe

try:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ModuleNotFoundError:
    Progress = None  # type: ignore[assignment,misc]


class Rows:
    """A JSONL file with rows of steps, from a step on; those of later ones, left by a run that died, are dropped."""

    def __init__(self, path: Path, start: int):
        kept = [row for row in read_metrics(path) if row["step"] < start]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", buffering=1)

    def add(self, step: int, **values) -> None:
        """Append a row."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        self.file.close()


class RunLog:
    """Metrics of a run, from a step on, and how far it is."""

    def __init__(self, folder: Path, recipe: Recipe, start: int):
        self.steps, self.start, self.began = recipe.steps, start, time.perf_counter()
        self.rows = Rows(folder / "metrics.jsonl", start)
        self.events = _tensorboard(folder / "tensorboard", start) if recipe.run.tensorboard else None
        self.wandb = _wandb(folder, recipe) if recipe.run.wandb else None
        self.bar = None
        if Progress is not None and sys.stdout.isatty():
            self.bar = Progress(
                *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")),
            )
            self.task = self.bar.add_task("", total=self.steps, completed=start)
            self.bar.start()

    def metrics(self, step: int, **values: float | str) -> None:
        """Append one line to metrics.jsonl, and the numbers to TensorBoard and Weights & Biases."""
        self.rows.add(step, **values)
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if self.events:
            for key, value in numbers.items():
                self.events.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def progress(self, step: int, text: str) -> None:
        """Move the bar; without a terminal, print about ten lines over the run."""
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        elif step == self.steps or step // max(1, self.steps // 10) > (step - 1) // max(1, self.steps // 10):
            print(f"{step:6d}/{self.steps}  {time.perf_counter() - self.began:6.1f} s  {text}", flush=True)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        (self.bar.console.print if self.bar else print)(text)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        self.rows.close()
        if self.events:
            self.events.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that was cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _tensorboard(folder: Path, start: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        print("TensorBoard is not installed; metrics.jsonl has all metrics (pip install 'evakernels[train]')")
        return None
    return SummaryWriter(str(folder), purge_step=start)


def _wandb(folder: Path, recipe: Recipe):
    """The run on Weights & Biases; one that is continued goes on there by the id that is kept in its folder."""
    kept = folder / "wandb-id"
    run = extra("wandb", "wandb", "run.wandb", group=None).init(
        project="evaclip",
        name=folder.name,
        dir=str(folder),
        config=dataclasses.asdict(recipe),
        id=kept.read_text() if kept.is_file() else None,
        resume="allow",
    )
    kept.write_text(run.id)
    return run
