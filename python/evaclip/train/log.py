"""What a run tells while it goes: a progress bar, metrics.jsonl, TensorBoard."""

import json
import sys
import time
from pathlib import Path

from evaclip.files import write_text

try:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ModuleNotFoundError:
    Progress = None  # type: ignore[assignment,misc]


class RunLog:
    """Metrics of a run, from a step on; lines of later steps, left by a run that died, are dropped."""

    def __init__(self, folder: Path, steps: int, start: int, tensorboard: bool):
        self.steps, self.start, self.began = steps, start, time.perf_counter()
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] < start]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = self.path.open("a", buffering=1)
        self.events = _tensorboard(folder / "tensorboard", start) if tensorboard else None
        self.bar = None
        if Progress is not None and sys.stdout.isatty():
            self.bar = Progress(
                *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")),
            )
            self.task = self.bar.add_task("", total=steps, completed=start)
            self.bar.start()

    def metrics(self, step: int, **values: float | str) -> None:
        """Append one line to metrics.jsonl, and the numbers to TensorBoard."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.events:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self.events.add_scalar(key, value, step)

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
        self.file.close()
        if self.events:
            self.events.close()


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
