"""Frames of videos, and features that are their mean."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import mixture, numbers, write_tar

import evaclip
from evaclip.data import ImageError, image_transform
from evaclip.data.preprocess import normalized
from evaclip.data.readers import Readers
from evaclip.data.video import frame_numbers, video_frames

SIDE = 32


def clip(length: int, kind: str) -> bytes:
    """A video whose frame i is grey of shade 5 i."""
    frames = [Image.new("RGB", (SIDE, SIDE), (5 * i,) * 3) for i in range(length)]
    out = io.BytesIO()
    if kind in ("gif", "webp"):
        options = {"lossless": True} if kind == "webp" else {}
        frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=40, **options)
        return out.getvalue()
    av = pytest.importorskip("av")
    with av.open(out, mode="w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=25)  # without loss
        stream.width = stream.height = SIDE
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (8, 8, list(range(8))),
        (16, 8, [1, 3, 5, 7, 9, 11, 13, 15]),
        (100, 4, [12, 37, 62, 87]),
        (1, 4, [0] * 4),
        (3, 8, [0, 0, 0, 1, 1, 2, 2, 2]),
        (5, 1, [2]),
    ],
)
def test_frames_are_the_middles_of_equal_stretches(total, count, expected):
    assert frame_numbers(total, count) == expected


@pytest.mark.parametrize("kind", ["gif", "webp", "mkv"])
@pytest.mark.parametrize("length", [5, 8, 40])
def test_the_right_frames_are_read(kind, length):
    frames = video_frames(clip(length, kind), kind, 8)
    shades = [np.asarray(frame).mean() / 5 for frame in frames]
    assert [round(shade) for shade in shades] == frame_numbers(length, 8)
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (SIDE, SIDE))}


@pytest.mark.parametrize("kind", ["gif", "mkv"])
def test_a_damaged_video_is_named(kind):
    data = clip(20, kind)
    with pytest.raises(ImageError, match="shard: key"):
        video_frames(data[:60], kind, 8, name="shard: key")


def test_without_pyav_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"reading \.mp4 needs av: pip install 'evakernels\[video\]'"):
        video_frames(b"", "mp4", 8)


def test_a_clip_is_cut_in_one_place():
    frames = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))] * 3
    pixels = image_transform(16, mode="train").random_clip(frames, np.random.default_rng(0))
    assert pixels.shape == (3, 3, 16, 16)
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])


def test_batches_of_videos_have_a_dimension_of_frames(tmp_path):
    members = {}
    for n in range(6):
        members |= {f"{n}.gif": clip(8 + n, "gif"), f"{n}.txt": b"%d" % n}
    write_tar(tmp_path / "a.tar", members)
    batches = mixture(str(tmp_path / "a.tar"), cache=tmp_path, batch_size=3, frames=8)
    images, ids = Readers(batches, 0).batch(0)
    assert images.shape == (3, 8, 3, 8, 8) and images.dtype == torch.uint8
    for video, number in zip(normalized(images), numbers(ids), strict=True):
        means = video.mean((1, 2, 3))
        expected = torch.tensor(frame_numbers(8 + number, 8)) * 5 / 255
        slope = (means - means[0]) / (expected - expected[0]).clamp(min=1e-9)
        assert torch.allclose(slope[1:], slope[1:].mean().expand(7), rtol=1e-3)  # brightness grows as in the clip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return evaclip.create_model("EVA02-CLIP-tiny").eval()


def test_features_of_a_video_are_the_mean_of_those_of_its_frames(model):
    frames = torch.randn(2, 8, model.config.vision.channels, *_size(model))
    kept = torch.tensor([[0, 1, 2], [3, 1, 0]])
    ids = torch.tensor([[1, 2, 3], [1, 3, 3]])
    with torch.no_grad():
        for which in (None, kept):
            means = []
            for number, video in enumerate(frames):
                of_all = None if which is None else which[number].expand(8, -1)
                means.append(model.encode_image(video, kept=of_all).mean(0))
            expected = torch.stack(means)
            torch.testing.assert_close(model.encode_video(frames, kept=which), expected)
            unit = expected / expected.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(model.encode_video(frames, kept=which, normalize=True), unit)
            torch.testing.assert_close(model(frames, ids, kept=which)[0], unit)


def test_a_still_video_has_the_features_of_its_image(model):
    image = torch.randn(3, model.config.vision.channels, *_size(model))
    with torch.no_grad():
        still = model.encode_video(image[:, None].expand(-1, 8, -1, -1, -1), normalize=True)
        torch.testing.assert_close(still, model.encode_image(image, normalize=True))


def _size(model) -> tuple[int, int]:
    size = model.config.vision.image_size
    return size if isinstance(size, tuple) else (size, size)
