"""Preprocessing against torchvision's transforms on the same Pillow images."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evaclip.data import ImageError, image_transform, open_image, preprocess
from evaclip.data.preprocess import MEAN, STD, random_crop

SIZES = [(32, 32), (48, 31), (31, 48), (33, 100), (101, 34), (20, 20), (13, 29), (32, 33), (35, 32), (640, 427), (1, 5)]


def picture(width, height, mode="RGB", seed=0):
    """Smooth shapes with noise, so that neither resizing nor cropping goes unnoticed."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 3 + c) * 60 + np.cos(y / 5 + 2 * c) * 60 + 128 for c in range(3)]
    pixels = np.stack(waves, -1) + random.normal(0, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def T():
    return pytest.importorskip("torchvision.transforms")


def theirs(T, *steps, mean=MEAN, std=STD):
    return T.Compose([*steps, T.ToTensor(), T.Normalize(mean, std)])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", [32, 31])
def test_crop_is_torchvisions_resize_and_centre_crop(T, size, target):
    image = picture(*size)
    expected = theirs(T, T.Resize(target, T.InterpolationMode.BICUBIC), T.CenterCrop(target))(image)
    actual = image_transform(target)(image)
    assert actual.dtype == torch.float32 and actual.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_squash_is_torchvisions_resize_to_both_sides(T, size):
    expected = theirs(T, T.Resize((32, 24), T.InterpolationMode.BICUBIC))(picture(*size))
    actual = image_transform((32, 24), mode="squash")(picture(*size))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_training_crop_is_torchvisions_resized_crop_of_the_same_box(T, size):
    image = picture(*size)
    left, top, right, bottom = random_crop(*size, np.random.default_rng(5))
    box = top, left, bottom - top, right - left
    cropped = T.functional.resized_crop(image, *box, [32, 32], T.InterpolationMode.BICUBIC)
    actual = image_transform(32, mode="train")(image, np.random.default_rng(5))
    torch.testing.assert_close(actual, theirs(T)(cropped), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_grey_images_are_scaled_to_plus_and_minus_one(T, mode):
    image = picture(47, 33, "L")
    resize = T.Resize(32 if mode == "crop" else (32, 32), T.InterpolationMode.BICUBIC)
    expected = theirs(T, resize, T.CenterCrop(32), mean=0.5, std=0.5)(image)
    actual = image_transform(32, mode=mode, channels=1)(image)
    assert actual.shape == (1, 32, 32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_a_rectangle_is_covered_and_its_middle_cut_out():
    image = image_transform((16, 48))(picture(50, 50))
    assert image.shape == (3, 16, 48)
    assert torch.equal(image, image_transform(48)(picture(50, 50))[:, 16:32])


def test_random_crops_are_distributed_as_torchvisions(T):
    width, height, count = 300, 280, 1500
    image = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    boxes = [T.RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    random = np.random.default_rng(0)
    ours = [random_crop(width, height, random) for _ in range(count)]

    def moments(boxes):
        top, left, h, w = np.array(boxes, dtype=float).T
        values = np.stack([h * w / (width * height), np.log(w / h), left / width, top / height])
        return values.mean(1), values.std(1)

    mean, std = moments([(t, left, b - t, r - left) for left, t, r, b in ours])
    their_mean, their_std = moments(boxes)
    assert np.all(abs(mean - their_mean) < 5 * their_std * math.sqrt(2 / count))
    assert np.all(abs(std / their_std - 1) < 5 / math.sqrt(count))


def test_aspect_ratios_are_log_uniform_where_the_image_has_room():
    random, count = np.random.default_rng(0), 3000
    boxes = np.array([random_crop(3000, 2800, random, (0.1, 0.5)) for _ in range(count)])
    ratio = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    drawn = np.sort(np.log(ratio) / math.log(4 / 3) / 2 + 0.5)
    assert abs(drawn - (np.arange(count) + 0.5) / count).max() < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov, 0.1 %


def test_random_crops_lie_inside_and_keep_area_and_aspect():
    random = np.random.default_rng(0)
    for width, height in [(64, 64), (90, 70), (70, 90)]:
        for _ in range(300):
            left, top, right, bottom = random_crop(width, height, random)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            w, h = right - left, bottom - top
            assert 0.88 < w * h / (width * height) <= 1 and 0.72 < w / h < 1.38


@pytest.mark.parametrize("size", [(300, 20), (20, 300)], ids=str)
def test_an_image_too_long_for_the_crop_gives_its_centre(T, size):
    box = random_crop(*size, np.random.default_rng(0))
    top, left, h, w = T.RandomResizedCrop.get_params(Image.new("RGB", size), [0.9, 1.0], [3 / 4, 4 / 3])
    assert box == (left, top, left + w, top + h)


def test_a_training_crop_depends_on_its_random_source_alone():
    transform, image = image_transform(32, mode="train"), picture(64, 48)
    first, again, other = (transform(image, np.random.default_rng(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="pass a numpy Generator"):
        transform(image)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 8, "mode": "flip"}, "mode is 'flip'; choose"),
        ({"size": 8, "channels": 4}, "channels is 4; choose 3"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        image_transform(**arguments)


@pytest.mark.filterwarnings("error")
def test_every_mode_is_read_as_rgb(tmp_path):
    rgb = picture(20, 10)
    paletted = rgb.quantize(16)
    paletted.info["transparency"] = bytes([0, 255, 128])
    alpha = rgb.copy()
    alpha.putalpha(7)
    deep = Image.fromarray(np.full((10, 20), 1000, dtype=np.uint16))
    files = {
        "p.png": paletted,
        "a.png": alpha,
        "cmyk.tif": rgb.convert("CMYK"),
        "l.png": rgb.convert("L"),
        "d.png": deep,
    }
    files |= {"one.png": rgb.convert("1"), "la.png": rgb.convert("LA"), "p.gif": rgb.quantize(8)}
    for name, image in files.items():
        image.save(tmp_path / name)
        assert open_image(tmp_path / name).mode == "RGB"
        assert open_image(tmp_path / name, channels=1).mode == "L"
    assert open_image(tmp_path / "a.png").tobytes() == rgb.tobytes()  # alpha is dropped, not blended
    assert open_image(tmp_path / "p.png").tobytes() == paletted.convert("RGBA").convert("RGB").tobytes()
    assert open_image(tmp_path / "l.png").tobytes() == rgb.convert("L").convert("RGB").tobytes()


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    picture(20, 10).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (20, 10)


def test_an_unreadable_image_is_an_error_that_names_the_file(tmp_path):
    picture(64, 64).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    picture(64, 64).save(tmp_path / "whole.png")
    png = (tmp_path / "whole.png").read_bytes()
    broken = {
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": png[: len(png) // 2],
        "damaged.png": png[:60] + b"\0\0\0\0\0\0" + png[66:],
        "empty.jpg": b"",
        "text.png": b"no image",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"cannot read the image .*{name}: "):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"missing\.png: FileNotFoundError"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match=r"cannot read the image "):
        open_image(tmp_path)


def test_without_pillow_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="needs Pillow: pip install"):
        preprocess.open_image("x.png")
