"""Which measures fit which data: the digits, a folder of classes, images with captions."""

from pathlib import Path
from typing import Any

import torch

from evaclip.data import Digits, ImageCaptions, ImageFolder
from evaclip.data.folder import EXTENSIONS
from evaclip.data.preprocess import ImageTransform
from evaclip.evaluate.features import Tokenizer, encode_images, encode_texts
from evaclip.evaluate.report import Results
from evaclip.evaluate.retrieval import retrieval
from evaclip.evaluate.templates import TEMPLATES
from evaclip.evaluate.zeroshot import zero_shot


def evaluate_digits(model: Any, tokenizer: Tokenizer) -> Results:
    """Numbers never seen in training, in handwriting never seen in training.

    Returns:
        zero-shot classification of 1,000 images among all 1,000 captions, and retrieval between the 500 unseen numbers
        and one image of each.
    """
    data = Digits(batch_size=1)
    images, captions = data.held_out()
    index = {caption: i for i, caption in enumerate(data.captions)}
    labels = torch.tensor([index[caption] for caption in captions])
    batches = zip(images.split(250), labels.split(250), strict=True)
    numbers = len(data.test_numbers)
    images, captions = images[:numbers], captions[:numbers]
    return {
        "zero-shot classification": zero_shot(model, tokenizer, batches, data.captions, ["{}"]),
        "retrieval": retrieval(
            encode_images(model, images.split(250)), encode_texts(model, tokenizer, captions), torch.arange(numbers)
        ),
    }


def evaluate_images(
    model: Any,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    data: str | Path,
    *,
    task: str = "auto",
    templates: tuple[str, ...] = TEMPLATES,
    batch_size: int = 64,
) -> Results:
    """Classification of a folder with one subfolder per class, or retrieval of images with captions.

    Args:
        data: a folder, or a CSV/TSV/JSONL table of images and captions.
        task: "classification", "retrieval", or "auto": retrieval for a table and where .txt files lie beside images.
        transform, templates, batch_size: how images are read, class names worded, images batched.

    Raises:
        FileNotFoundError: there is nothing at `data`.
        ValueError: the data does not fit the task; an image cannot be read.
    """
    data = Path(data)
    if not data.exists():
        raise FileNotFoundError(f"{data} does not exist; give a folder of images or a CSV/TSV/JSONL table")
    if task == "auto":
        beside = (file.with_suffix(".txt") for file in data.rglob("*") if file.suffix.lower() in EXTENSIONS)
        task = "retrieval" if data.is_file() or any(file.is_file() for file in beside) else "classification"
    if task == "classification":
        folder = ImageFolder(data)
        batches = folder.batches(batch_size, transform)
        return {"zero-shot classification": zero_shot(model, tokenizer, batches, folder.classes, templates)}
    pairs = ImageCaptions(data)
    captions, image_of_text = pairs.flat()
    images = encode_images(model, pairs.batches(batch_size, transform))
    return {"retrieval": retrieval(images, encode_texts(model, tokenizer, captions), image_of_text)}
