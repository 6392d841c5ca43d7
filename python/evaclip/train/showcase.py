"""What the quick start shows at its end: held-out figures, a picture of curves and retrievals, the next commands."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaclip.data.digits import Digits
from evaclip.evaluate.datasets import evaluate_digits
from evaclip.evaluate.features import encode_images, encode_texts
from evaclip.models.clip import CLIP
from evaclip.train.log import read_metrics

SHOWN = 8


def show_digits(model: CLIP, tokenizer: Callable[[list[str]], Tensor], folder: Path) -> dict[str, float]:
    """Print the held-out figures of a digits run, write its picture and an example image, name the next commands."""
    result = dict(evaluate_digits(model, tokenizer)["zero-shot classification"])
    data = Digits(batch_size=1)
    images, captions = data.held_out(60)
    _save_example(images[0], folder / "example.png")
    scores = encode_images(model, [images]) @ encode_texts(model, tokenizer, data.captions).T
    ranked = [[data.captions[i] for i in row] for row in scores.topk(3).indices.tolist()]
    picture = _plot(read_metrics(folder / "metrics.jsonl"), images, captions, ranked, folder)
    print(
        f"""
Held out: {result["samples"]:,} images of numbers never seen in training, in handwriting never seen in training;
the right one among {len(data.captions):,} captions is
  first            {100 * result["top1"]:5.1f} %   (chance: {100 / len(data.captions):.1f} %)
  in the first 5   {100 * result["top5"]:5.1f} %
{f"curves and retrievals: {picture}" if picture else "no picture: matplotlib is not installed"}

Next:
  evaclip eval {folder}
or, in Python:
  import evaclip; from PIL import Image; model, tokenizer, preprocess = evaclip.load("{folder}")
  image = model.encode_image(preprocess(Image.open("{folder}/example.png"))[None], normalize=True)
  print(image @ model.encode_text(tokenizer(["{captions[0]}", "one two three"]), normalize=True).T)
"""
    )
    return result


def _save_example(image: Tensor, path: Path) -> None:
    from PIL import Image

    Image.fromarray(((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()).save(path)


def _plot(metrics: list[dict], images: Tensor, truth: list[str], ranked: list[list[str]], folder: Path) -> Path | None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in metrics if "loss" in row]
    steps = [row["step"] for row in rows]
    figure = pyplot.figure(figsize=(11, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))  # type: ignore[misc]
    loss, accuracy = left.subplots(2, 1, sharex=True)
    loss.plot(steps, [row["loss"] for row in rows])
    loss.set(ylabel="contrastive loss", ylim=(0, None))
    accuracy.plot(steps, [100 * row["image_to_text"] for row in rows], label="image to text")
    accuracy.plot(steps, [100 * row["text_to_image"] for row in rows], label="text to image")
    accuracy.set(xlabel="step", ylabel="top-1 within the batch, %", ylim=(0, 100))
    accuracy.legend()
    right.suptitle("unseen numbers in unseen handwriting, best three of all captions")
    right_first = [i for i, caption in enumerate(truth) if ranked[i][0] == caption]
    wrong = [i for i in range(len(truth)) if i not in right_first]
    shown = (right_first[: SHOWN - len(wrong[:1])] + wrong)[:SHOWN]  # one mistake, where there is one
    for axis, i in zip(np.ravel(right.subplots(SHOWN, 1)), shown, strict=True):
        axis.imshow(images[i, 0], cmap="gray_r", aspect="equal")
        axis.set(xticks=[], yticks=[], anchor="W")
        for place, caption in enumerate(ranked[i]):
            style = {"color": "tab:green" if caption == truth[i] else "tab:red", "fontsize": 10 if place == 0 else 8}
            axis.text(1.05, 0.8 - 0.35 * place, caption, transform=axis.transAxes, va="center", **style)
    path = folder / "showcase.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
