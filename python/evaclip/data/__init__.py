"""Images and captions: where they come from, and how they become tensors.

Everything random is a pure function of (seed, step) or (seed, epoch, sample): nothing to save, exact to resume.
"""

from evaclip.data.common import DataError
from evaclip.data.digits import Digits
from evaclip.data.folder import CaptionBatches, ImageCaptions, ImageFolder
from evaclip.data.preprocess import ImageError, image_transform, normalized, open_image
from evaclip.data.tokenizer import ClipTokenizer, WordTokenizer, clip_tokenizer, get_tokenizer

__all__ = [
    "CaptionBatches",
    "ClipTokenizer",
    "DataError",
    "Digits",
    "ImageCaptions",
    "ImageError",
    "ImageFolder",
    "WordTokenizer",
    "clip_tokenizer",
    "get_tokenizer",
    "image_transform",
    "normalized",
    "open_image",
]
