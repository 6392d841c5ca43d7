"""A training sample on one core: a JPEG's content to a normalised crop of 224 px, and a caption to token ids.

A call is one image after the other of a set of photographs that are made of scikit-learn's two; times are per image.
`python -m benchmarks.bench_data` prints images per second of CPU time.
"""

import io
import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import torch

from benchmarks import harness
from evaclip.data.preprocess import image_transform, normalized, open_bytes, random_crop
from evaclip.data.tokenizer import clip_tokenizer

SIDES = ((500, 333), (640, 480), (800, 533), (1000, 667))
SIZE, QUALITY, BATCH = 224, 90, 64
CAPTION = "a photo of a small yellow house behind trees, taken from a hill in the early morning"


def photographs(width: int, height: int, count: int = 8) -> list[bytes]:
    """JPEGs of this size: parts of two photographs, of 300 px height and more, enlarged."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random, found = np.random.default_rng(0), []
    for number in range(count):
        image = Image.fromarray(load_sample_images().images[number % 2])
        w = min(image.width, round(image.height * width / height))
        h = round(w * height / width)
        left, top = random.integers(image.width - w + 1), random.integers(image.height - h + 1)
        image = image.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BICUBIC)
        image.save(out := io.BytesIO(), "JPEG", quality=QUALITY)
        found.append(out.getvalue())
    return found


def ours(files: list[bytes], decode: str) -> Callable[[], object]:
    """One image per call, and in every `BATCH`-th the normalisation of a batch, as the trainer's process does it."""
    transform, random = image_transform(SIZE, mode="train"), np.random.default_rng(0)
    batch = torch.empty(BATCH, 3, SIZE, SIZE, dtype=torch.uint8)
    place, content = cycle(range(BATCH)), cycle(files)

    def run() -> object:
        row = next(place)
        pixels = transform.random_pixels(next(content), random, decode=decode, name="")  # type: ignore[arg-type]
        batch[row] = torch.from_numpy(pixels)
        return normalized(batch) if row == BATCH - 1 else None

    return run


def open_clips(files: list[bytes]) -> Callable[[], object] | str:
    """open_clip's training transform as its WebDataset pipeline calls it: the whole image, then a tensor of each."""
    open_clip = harness.peer("open_clip")
    if isinstance(open_clip, str):
        return open_clip
    from PIL import Image

    augmentation = open_clip.transform.AugmentationCfg(scale=(0.9, 1.0))
    transform = open_clip.image_transform(SIZE, is_train=True, aug_cfg=augmentation)
    content = cycle(files)
    return lambda: transform(Image.open(io.BytesIO(next(content))))


def tokenizers() -> harness.Providers:
    tokenize, open_clip = clip_tokenizer(), harness.peer("open_clip")
    peer = open_clip if isinstance(open_clip, str) else open_clip.get_tokenizer("ViT-B-32")
    return {
        "evaclip": lambda: tokenize([CAPTION]),
        "open_clip": peer if isinstance(peer, str) else lambda: peer([CAPTION]),
    }


def rows(quick: bool) -> Iterator[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for width, height in SIDES[:: 3 if quick else 1]:
        files = photographs(width, height)
        providers: harness.Providers = {
            "evaclip, fast": ours(files, "fast"),
            "evaclip, exact": ours(files, "exact"),
            "open_clip": open_clips(files),
        }
        yield from harness.compare("data", f"{width} x {height} JPEG", "uint8", "image to crop", providers, quick=quick)
    yield from harness.compare("data", "18 words", "text", "tokenize", tokenizers(), quick=quick)
    torch.set_num_threads(threads)


def difference(files: list[bytes]) -> float:
    """Root mean square between fast and exact decoding of the same box, in levels of 255."""
    transform, errors = image_transform(SIZE, mode="train"), []
    for seed, content in enumerate(files):
        image = open_bytes(content)
        box = random_crop(image.width, image.height, np.random.default_rng(seed))
        scale = 2 if min(box[2] - box[0], box[3] - box[1]) >= 2 * SIZE else 1
        left, top, right, bottom = (
            scale * min(round(at / scale), end // scale) for at, end in zip(box, image.size * 2, strict=True)
        )
        exact = transform.pixels(image, (left, top, right, bottom)).astype(float)
        fast = transform.random_pixels(content, np.random.default_rng(seed), decode="fast", name="")
        errors.append(np.square(fast - exact).mean())
    return float(np.sqrt(np.mean(errors)))


def main() -> None:
    """A table by CPU time, which other processes on the machine change less than wall time."""
    torch.set_num_threads(1)
    print("| JPEG | fast | exact | open_clip | fast : open_clip | difference of fast to exact |")
    print("|---|---:|---:|---:|---:|---:|")
    for width, height in SIDES:
        files = photographs(width, height)
        providers = {"fast": ours(files, "fast"), "exact": ours(files, "exact"), "open_clip": open_clips(files)}
        seconds: dict[str, list[float]] = {name: [] for name in providers}
        for _ in range(7):
            for name, run in providers.items():
                if callable(run):
                    began = time.process_time()
                    for _ in range(BATCH):
                        run()
                    seconds[name].append((time.process_time() - began) / BATCH)
        rates = {name: 1 / statistics.median(taken) if taken else math.nan for name, taken in seconds.items()}
        columns = [f"{width} x {height}", *(f"{rate:.0f}/s" for rate in rates.values())]
        columns += [f"{rates['fast'] / rates['open_clip']:.2f}", f"{difference(files):.1f} of 255"]
        print("| " + " | ".join(columns) + " |")


if __name__ == "__main__":
    main()
