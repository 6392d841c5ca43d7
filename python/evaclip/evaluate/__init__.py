"""What a model knows without being taught: zero-shot classification and retrieval.

A model is anything with `encode_image(images)` and `encode_text(ids)`, which return features (n, E), not normalised.
"""

from evaclip.evaluate.features import encode_images, encode_texts
from evaclip.evaluate.report import print_results, table, write_json
from evaclip.evaluate.retrieval import retrieval
from evaclip.evaluate.templates import TEMPLATES, load_templates
from evaclip.evaluate.zeroshot import classifier, zero_shot

__all__ = [
    "TEMPLATES",
    "classifier",
    "encode_images",
    "encode_texts",
    "load_templates",
    "print_results",
    "retrieval",
    "table",
    "write_json",
    "zero_shot",
]
