"""From image files to tensors, as CLIP was trained and tested, with Pillow alone."""

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaclip.data.common import extra

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
GRAY_MEAN, GRAY_STD = (0.5,), (0.5,)
SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)  # of the training crop: area, and width over height

Mode = Literal["crop", "squash", "train"]
Decode = Literal["exact", "fast"]
Box = tuple[int, int, int, int]  # left, top, right, bottom


class ImageError(ValueError):
    """An image that cannot be read; the message names the file."""


def open_image(path: str | os.PathLike, channels: int = 3) -> "Image":
    """Read a whole image file as RGB, or as grey with one channel.

    Palettes, CMYK and 16 bits are converted; an alpha channel is dropped; the EXIF orientation is not applied, and
    conversion comes before resizing: as open_clip's training pipeline does.

    Raises:
        ImageError: the file is missing, truncated or no image.
        ImportError: Pillow is not installed.
    """
    pillow = _pillow()
    with named_error(path), pillow.open(path) as image:
        return read_image(image, channels)


def open_bytes(data: bytes, channels: int = 3, *, name: str = "image") -> "Image":
    """`open_image` of a file's content; `name` is for messages."""
    pillow = _pillow()
    with named_error(name), pillow.open(io.BytesIO(data)) as image:
        return read_image(image, channels)


def read_image(image: "Image", channels: int) -> "Image":
    """An opened image as RGB or grey; see `open_image`."""
    image.load()
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return _converted(image, channels)


@contextmanager
def named_error(name: str | os.PathLike) -> Iterator[None]:
    """Whatever goes wrong in here, as an ImageError that names the image."""
    try:
        yield
    except Exception as error:  # Pillow's readers raise what they please on damaged files
        reason = f"{type(error).__name__}: {error}".replace(f" {os.fspath(name)!r}", "")
        reason = re.sub(r" <_io.BytesIO object at \w+>", "", reason)
        raise ImageError(f"cannot read the image {os.fspath(name)}: {reason}") from error


@dataclass(frozen=True)
class ImageTransform:
    """What `image_transform` returns: an image, and a random source in training, to a tensor."""

    size: tuple[int, int]  # height, width
    mode: Mode
    channels: int
    scale: tuple[float, float] = SCALE

    def __call__(self, image: "Image", random: np.random.Generator | None = None) -> Tensor:
        """The image as (channels, H, W) float32; `random` is needed in mode "train", and unused in the others."""
        return normalized(torch.from_numpy(self.pixels(image, self.box(image, random))))

    def box(self, image: "Image", random: np.random.Generator | None) -> Box | None:
        """The part of an image to take: a random one in mode "train", else all of it."""
        if self.mode != "train":
            return None
        if random is None:
            raise ValueError('image_transform: mode "train" crops at random; pass a numpy Generator')
        return random_crop(image.width, image.height, random, self.scale)

    def pixels(self, image: "Image", box: Box | None = None) -> np.ndarray:
        """The image, or a box of it (all of it, distorted, in mode "train"), as (channels, H, W) uint8."""
        image = _converted(image, self.channels)
        if box is not None:
            image = image.crop(box)
        height, width = self.size
        inner = width, height
        if self.mode == "crop":
            inner = _cover(image.width, image.height, width, height)
        if image.size != inner:
            image = image.resize(inner, _pillow().Resampling.BICUBIC)
        if inner != (width, height):
            left, top = round((inner[0] - width) / 2), round((inner[1] - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        return _planes(image)

    def random_pixels(self, data: bytes, random: np.random.Generator, *, decode: Decode, name: str) -> np.ndarray:
        """A random crop of an image file's content, as (channels, H, W) uint8.

        Args:
            decode: "exact" crops and resizes the whole image, as a call does. "fast" decodes a JPEG at a half, quarter
                or eighth of its size where that still covers the result, so that most pixels are never computed,
                moves the box to whole pixels of that, and resizes by PyTorch's antialiased bicubic filter.
            name: the image's, for messages.

        Raises:
            ImageError: the content is truncated or no image.
        """
        pillow = _pillow()
        with named_error(name), pillow.open(io.BytesIO(data)) as image:
            box = random_crop(image.width, image.height, random, self.scale)
            if decode == "exact":
                return self.pixels(read_image(image, self.channels), box)
            return self._scaled(image, box)

    def random_clip(self, frames: "Sequence[Image]", random: np.random.Generator) -> np.ndarray:
        """One random box of all frames of a video, as (frames, channels, H, W) uint8."""
        box = random_crop(frames[0].width, frames[0].height, random, self.scale)
        return np.stack([self.pixels(frame, box) for frame in frames])

    def _scaled(self, image: "Image", box: Box) -> np.ndarray:
        (height, width), (full_width, full_height) = self.size, image.size
        left, top, right, bottom = box
        fits = min((right - left) // width, (bottom - top) // height)
        scale = next((s for s in (8, 4, 2) if s <= fits), 1)
        if scale > 1:
            image.draft(_MODES[self.channels], (full_width // scale, full_height // scale))  # of a JPEG alone
        image = read_image(image, self.channels)
        scale = round(full_width / image.width)  # an incomplete pixel at the edge counts as one, and is left out
        most = (full_width // scale, full_height // scale) * 2
        left, top, right, bottom = (min(round(at / scale), end) for at, end in zip(box, most, strict=True))
        pixels = np.array(image).reshape(image.height, image.width, -1)[top:bottom, left:right]
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return F.interpolate(x, self.size, mode="bicubic", antialias=True)[0].contiguous().numpy()


def image_transform(
    size: int | tuple[int, int], *, mode: Mode = "crop", channels: int = 3, scale: tuple[float, float] = SCALE
) -> ImageTransform:
    """CLIP's preprocessing: to a tensor of `size`, normalised with CLIP's mean and standard deviation.

    Args:
        size: side, or height and width, in pixels.
        mode: "crop" resizes the shorter side (bicubic, antialiased) and crops the centre; "squash" resizes to exactly
            `size`; "train" cuts a share of the area at an aspect ratio of 3/4 to 4/3, resizes it, never flips.
        channels: 3; or 1 for grey images, normalised with mean 0.5 and standard deviation 0.5.
        scale: that share, from and to.

    Returns:
        A callable `(image, random=None) -> (channels, H, W) float32`; `random` is a numpy Generator.

    Raises:
        ValueError: an argument is none of these.

    Source: Radford et al., arXiv 2103.00020; the training crop is EVA-CLIP's, arXiv 2303.15389.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image_transform: size is {size}; give at least one pixel each way")
    if mode not in ("crop", "squash", "train"):
        raise ValueError(f'image_transform: mode is {mode!r}; choose "crop", "squash" or "train"')
    if channels not in _MODES:
        raise ValueError(f"image_transform: channels is {channels}; choose 3 (RGB) or 1 (grey)")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"image_transform: scale is {scale}; it must be (from, to) with 0 < from <= to <= 1")
    return ImageTransform((height, width), mode, channels, scale)


def random_crop(width: int, height: int, random: np.random.Generator, scale: tuple[float, float] = SCALE) -> Box:
    """A random box (left, top, right, bottom) of `scale` of the area, its aspect ratio log-uniform in `RATIO`.

    Source: Szegedy et al., arXiv 1409.4842, section 6.
    """
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    # The image is too long for any such box: the centre, as wide or as high as the ratio allows.
    w, h = width, height
    if width < height * RATIO[0]:
        h = round(width / RATIO[0])
    elif width > height * RATIO[1]:
        w = round(height * RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


_MODES = {3: "RGB", 1: "L"}


def _pillow():
    return extra("PIL.Image", "Pillow", "reading images")


def _converted(image: "Image", channels: int) -> "Image":
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def _cover(width: int, height: int, target_width: int, target_height: int) -> tuple[int, int]:
    """The smallest size of this aspect ratio that covers the target."""
    if width * target_height <= height * target_width:
        return target_width, int(target_width * height / width)
    return int(target_height * width / height), target_height


def _planes(image: "Image") -> np.ndarray:
    pixels = np.array(image)
    return pixels[None] if image.mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def normalized(pixels: Tensor) -> Tensor:
    """Pixels (..., channels, H, W) uint8 as float32, with the mean and standard deviation of `image_transform`."""
    of_set = (GRAY_MEAN, GRAY_STD) if pixels.shape[-3] == 1 else (MEAN, STD)
    # Filled on the device, where a graph may capture it; and `most`, as by a number CUDA divides inexactly.
    mean, std = (torch.stack([torch.full((1, 1), x, device=pixels.device) for x in row]) for row in of_set)
    most = torch.full((), 255.0, device=pixels.device)
    return pixels.to(torch.float32).div_(most).sub_(mean).div_(std)
