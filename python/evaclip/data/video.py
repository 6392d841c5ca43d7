"""Frames of videos, evenly spread over time."""

import io
from typing import TYPE_CHECKING

import numpy as np

from evaclip.data.common import extra
from evaclip.data.preprocess import named_error, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

ANIMATIONS = ("gif", "webp", "png")  # what Pillow reads by itself


def frame_numbers(total: int, count: int) -> list[int]:
    """The frames in the middle of `count` equal stretches of a video of `total` frames; repeated where it has less."""
    return ((2 * np.arange(count) + 1) * total // (2 * count)).tolist()


def video_frames(data: bytes, suffix: str, count: int, *, channels: int = 3, name: str = "video") -> "list[Image]":
    """`count` frames of a video file's content, evenly spread.

    Args:
        suffix: of the file; animated GIF and WebP need Pillow alone, the others PyAV.
        channels: 3 for RGB, 1 for grey.
        name: the video's, for messages.

    Raises:
        ImageError: the content is truncated or no video.
        ImportError: PyAV is not installed.
    """
    read, module = (_animation, "PIL.Image") if suffix in ANIMATIONS else (_video, "av")
    extra(module, module.removesuffix(".Image"), f"reading .{suffix}", "video")
    with named_error(name):
        return [read_image(frame, channels) for frame in read(data, count)]


def _animation(data: bytes, count: int) -> "list[Image]":
    import PIL.Image

    frames = []
    with PIL.Image.open(io.BytesIO(data)) as image:
        for number in frame_numbers(getattr(image, "n_frames", 1), count):
            image.seek(number)
            frames.append(image.convert("RGB"))
    return frames


def _video(data: bytes, count: int) -> "list[Image]":
    """Two passes: packets are counted, since headers may lie about frames, and only then decoded."""
    import av

    with av.open(io.BytesIO(data), mode="r") as container:
        total = sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
    if not total:
        raise ValueError("it has no frames")
    wanted = frame_numbers(total, count)
    frames: list[Image] = []
    with av.open(io.BytesIO(data), mode="r") as container:
        container.streams.video[0].thread_type = "NONE"  # there is a reader per core
        for number, frame in enumerate(container.decode(video=0)):
            frames += [frame.to_image()] * wanted.count(number)
            if len(frames) == count:
                return frames
    if not frames:
        raise ValueError("no frame can be decoded")
    return frames + [frames[-1]] * (count - len(frames))  # packets that gave no frame
