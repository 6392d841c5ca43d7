"""`evaclip plot RUN...`: one picture of runs, from their metrics.jsonl."""

from pathlib import Path

from evaclip.data.common import extra
from evaclip.train.log import read_metrics

PANELS = (  # what is drawn, and the name of its axis
    ("loss", "contrastive loss"),
    ("image_to_text", "top-1 within the batch"),
    ("logit_scale", "logit scale"),
    ("grad_norm", "norm of the gradients"),
    ("lr", "learning rate, vision"),
    ("trust_ratio_min", "smallest trust ratio"),
    ("trust_ratio_max", "largest trust ratio"),
    ("loss_scale", "loss scale"),
    ("samples_per_second", "samples/s"),
    ("mfu", "MFU"),
    ("data_wait", "share of time waiting for data"),
    ("memory_gb", "memory, GB"),
)


def draw(runs: list[Path], output: Path) -> Path:
    """Draw every metric that any of the runs has, over its steps, one line a run.

    Returns:
        `output`.

    Raises:
        ValueError: no run is given, or a folder has no metrics.
        ImportError: matplotlib is not installed.
    """
    if not runs:
        raise ValueError("which runs? Give folders that `evaclip train` wrote")
    rows = {run: read_metrics(run / "metrics.jsonl") for run in runs}
    for run, found in rows.items():
        if not found:
            raise ValueError(f"{run} has no metrics.jsonl with a line in it; give folders that `evaclip train` wrote")
    matplotlib = extra("matplotlib", "matplotlib", "drawing runs")
    matplotlib.use("Agg")
    pyplot = extra("matplotlib.pyplot", "matplotlib", "drawing runs")

    panels = [(key, label) for key, label in PANELS if any(key in row for found in rows.values() for row in found)]
    columns = min(3, max(1, len(panels)))
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(5 * columns, 3 * -(-len(panels) // columns)),
        layout="constrained", squeeze=False, sharex=True,
    )  # fmt: skip
    for axis, (key, label) in zip(axes.flat, panels, strict=False):
        for run, found in rows.items():
            points = [(row["step"], row[key]) for row in found if key in row]
            axis.plot(*zip(*points, strict=True), label=str(run), linewidth=1) if points else None
        axis.set(ylabel=label, xlabel="step")
        axis.tick_params(labelbottom=True)  # also where the axis below, which shares its steps, has nothing to draw
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize="small")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    pyplot.close(figure)
    return output
