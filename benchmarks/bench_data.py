"""Training batches on one core: from shards of JPEGs and captions to images of 224 px and token ids.

A call makes a batch in this process, without workers, from photographs that are made of scikit-learn's two.
`python -m benchmarks.bench_data` prints images per second of CPU time.
"""

import argparse
import io
import math
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from evaclip.data.mixture import Mixture
from evaclip.data.preprocess import image_transform, normalized, open_bytes, random_crop
from evaclip.data.readers import Readers
from evaclip.data.shards import Shards
from evaclip.data.tokenizer import clip_tokenizer

SIDES = ((500, 333), (640, 480), (800, 533), (1000, 667))
SIZE, QUALITY, BATCH, SAMPLES = 224, 90, 64, 1024
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


def write_shards(folder: Path, files: list[bytes], shards: int = 2) -> str:
    """Write `SAMPLES` samples, in which the files repeat, and return the shards' paths as a brace list."""
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(SAMPLES // shards):
                for suffix, content in (("jpg", files[number % len(files)]), ("txt", CAPTION.encode())):
                    member = tarfile.TarInfo(f"{shard}{number:08}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / f"{{0..{shards - 1}}}.tar")


def ours(source: str, decode: str, *, normalise: bool = False) -> Callable[[], object]:
    """Batches as readers make them, uint8, as they travel to a GPU; or normalised too, as for a CPU."""
    shards = Shards(source, cache=Path(source).parent / "cache")
    transform, tokenizer = image_transform(SIZE, mode="train"), clip_tokenizer()
    mixture = Mixture([shards], BATCH, seed=0, transform=transform, tokenizer=tokenizer, decode=decode)  # type: ignore[arg-type]
    readers, steps = Readers(mixture, 0), count()

    def run() -> object:
        images, ids = readers.batch(next(steps))
        return normalized(images) if normalise else images, ids

    return run


def open_clips(source: str) -> Callable[[], object] | str:
    """open_clip's training pipeline: webdataset's stages in its order, its transform and tokenizer.

    Composed here because `open_clip_train.data` fails with the webdataset of today.
    """
    open_clip, webdataset = harness.peer("open_clip"), harness.peer("webdataset")
    if isinstance(open_clip, str) or isinstance(webdataset, str):
        return open_clip if isinstance(open_clip, str) else webdataset
    augmentation = open_clip.transform.AugmentationCfg(scale=(0.9, 1.0))
    transform = open_clip.image_transform(SIZE, is_train=True, aug_cfg=augmentation)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    stages = (
        webdataset.ResampledShards(source),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(bufsize=5000, initial=1000),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(BATCH, partial=False),
    )
    batches = iter(webdataset.DataPipeline(*stages))
    return lambda: next(batches)


def pipelines(source: str) -> harness.Providers:
    return {
        "evaclip, fast": ours(source, "fast"),
        "evaclip, fast, normalised": ours(source, "fast", normalise=True),
        "evaclip, exact": ours(source, "exact"),
        "open_clip": open_clips(source),
    }


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
        with tempfile.TemporaryDirectory() as folder:
            providers = pipelines(write_shards(Path(folder), photographs(width, height)))
            shape = f"{BATCH} JPEGs of {width} x {height}"
            yield from harness.compare("data", shape, "uint8", "batch", providers, samples=BATCH, quick=quick)
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
    argparse.ArgumentParser("python -m benchmarks.bench_data", description=main.__doc__).parse_args()
    torch.set_num_threads(1)
    names = ("fast", "fast, normalised", "exact", "open_clip")
    print("| JPEG | " + " | ".join(names) + " | fast : open_clip | difference of fast to exact |")
    print("|---|" + "---:|" * (len(names) + 2))
    for width, height in SIDES:
        files = photographs(width, height)
        with tempfile.TemporaryDirectory() as folder:
            providers = pipelines(write_shards(Path(folder), files))
            seconds: dict[str, list[float]] = {name: [] for name in providers}
            for turn in range(8):
                for name, run in providers.items():
                    if callable(run):
                        began = time.process_time()
                        run()
                        if turn:  # the first call opens files and fills buffers
                            seconds[name].append((time.process_time() - began) / BATCH)
        rates = [1 / statistics.median(taken) if taken else math.nan for taken in seconds.values()]
        columns = [f"{width} x {height}", *(f"{rate:.0f}/s" for rate in rates)]
        columns += [f"{rates[0] / rates[-1]:.2f}", f"{difference(files):.1f} of 255"]
        print("| " + " | ".join(columns) + " |", flush=True)


if __name__ == "__main__":
    main()
