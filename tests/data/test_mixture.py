"""Batches from shards: functions of (seed, step), whole over ranks, in proportion, around what is broken."""

import io
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import BROKEN, NUMBERS, jpeg, mixture, numbers, write_shards, write_tar

from evaclip.data import DataError, image_transform
from evaclip.data.mixture import Unreadable
from evaclip.data.preprocess import normalized, open_bytes, random_crop
from evaclip.data.readers import Readers


def read(batches, step, parts=1):
    """Pixels and ids of a step, read in parts, and what reading went through."""
    images, ids = (
        torch.zeros(batches.size, *batches.image_shape, dtype=torch.uint8),
        torch.zeros(batches.size, 3).long(),
    )
    tallies = [batches.read(step, images, ids, part, parts) for part in range(parts)]
    return images, ids, tallies


@pytest.fixture(params=["epoch", "resampled"])
def mode(request):
    return request.param


def test_a_batch_is_a_function_of_seed_and_step(tmp_path, mode):
    source = write_shards(tmp_path, [9, 4, 0, 12, 5])
    first = mixture(source, cache=tmp_path, mode=mode)
    steps = [read(first, step) for step in range(12)]
    later = mixture(source, cache=tmp_path, mode=mode)
    for step in (11, 3, 7):  # as a run does that goes on from a checkpoint
        images, ids, _ = read(later, step)
        assert torch.equal(images, steps[step][0]) and torch.equal(ids, steps[step][1])
    assert not torch.equal(read(mixture(source, cache=tmp_path, mode=mode, seed=1), 0)[1], steps[0][1])


@pytest.mark.parametrize(("world", "parts"), [(2, 1), (4, 2), (3, 4), (1, 5)])
def test_the_parts_of_all_ranks_and_readers_are_the_batch(tmp_path, mode, world, parts):
    sources = [
        write_shards(tmp_path / "a", [9, 4, 12, 5], broken=[2, 7]),
        write_shards(tmp_path / "b", [20], first=100),
    ]
    options = {"cache": tmp_path, "mode": mode, "weights": [2.5, 1], "batch_size": 11}
    whole = mixture(*sources, **options)
    ranks = [mixture(*sources, **options, rank=rank, world=world) for rank in range(world)]
    assert sum(rank.size for rank in ranks) == 11
    for step in range(6):
        images, ids, _ = read(whole, step)
        shares = [read(rank, step, parts) for rank in ranks]
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), ids)


def test_an_epoch_sees_every_sample_once_and_images_belong_to_captions(tmp_path):
    source = write_shards(tmp_path, [9, 4, 12, 5])
    batches = mixture(source, cache=tmp_path, transform=image_transform((12, 10), mode="train"), decode="exact")
    pictures = [np.array(open_bytes(jpeg(n)), dtype=float).transpose(2, 0, 1) for n in range(30)]
    for epoch in range(3):
        seen = []
        for step in range(5 * epoch, 5 * epoch + 5):
            images, ids, _ = read(batches, step)
            seen += numbers(ids)
            for pixels, number in zip(images, numbers(ids), strict=True):
                distances = [np.square(pixels.numpy().astype(float) - picture).mean() for picture in pictures]
                assert np.argmin(distances) == number
        assert sorted(seen) == list(range(30))


def test_a_mixture_keeps_its_proportions_and_each_set_its_epochs(tmp_path):
    sources = [write_shards(tmp_path / "a", [20, 20]), write_shards(tmp_path / "b", [10], first=100)]
    batches = mixture(*sources, cache=tmp_path, weights=[4, 1], batch_size=10)
    seen = [numbers(read(batches, step)[1]) for step in range(25)]
    assert all(sum(n < 100 for n in batch) == 8 for batch in seen)
    times = Counter(n for batch in seen for n in batch)
    assert {times[n] for n in range(40)} == {5} and {times[n] for n in range(100, 110)} == {5}
    # Seeds are shared, but the sets of a mixture are shuffled independently.
    one, two = mixture(sources[0], cache=tmp_path), mixture(sources[1], sources[0], cache=tmp_path, batch_size=12)
    assert [p.position for p in one.places(0)] != [p.position for p in two.places(0)[6:]]


def test_within_a_batch_samples_lie_by_set_and_shard(tmp_path):
    sources = [write_shards(tmp_path / "a", [10] * 4), write_shards(tmp_path / "b", [10] * 4, first=100)]
    batches = mixture(*sources, cache=tmp_path, batch_size=16)
    shards = [(p.set, batches.orders[p.set].sample(p.position)[0]) for p in batches.places(3)]
    assert shards == sorted(shards)


def test_what_is_broken_is_replaced_by_what_stands_there_in_the_next_batch(tmp_path):
    counts, broken = [9, 4, 12, 5], [3, 17, 21]
    whole = mixture(write_shards(tmp_path / "whole", counts), cache=tmp_path)
    batches = mixture(write_shards(tmp_path / "broken", counts, broken=broken), cache=tmp_path)
    sequence = {}  # what is at each position
    for step in range(10):
        for place, number in zip(whole.places(step), numbers(read(whole, step)[1]), strict=True):
            sequence[place.position] = number
    for step in range(4):
        _, ids, (tally,) = read(batches, step)
        expected, failed = [], 0
        for place in whole.places(step):
            position = place.position
            while sequence[position] in broken:
                position, failed = position + 6, failed + 1
            expected.append(sequence[position])
        assert numbers(ids) == expected and len(set(expected)) == 6
        assert (tally.tried, tally.failed) == (6 + failed, failed)


def test_each_unreadable_sample_is_logged_once_with_shard_and_key(tmp_path, caplog):
    source = write_shards(tmp_path, [9, 4], broken=[3, 11])
    readers = Readers(mixture(source, cache=tmp_path), 0)
    with caplog.at_level(logging.WARNING):
        for step in range(8):
            readers.batch(step)
    assert sorted(readers.unreadable) == [f"{tmp_path}/000.tar: 0003", f"{tmp_path}/001.tar: 0011"]
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 2 and all("another sample takes its place" in m for m in messages)
    assert "000.tar: 0003: UnidentifiedImageError" in messages[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0001.txt", b"\xff\xfe"),
        ("0001.txt", b" \n"),
        ("0001.captions.json", b'{"captions": []}'),
        ("0001.captions.json", b"{"),
        ("0001.captions.json", b"[]"),
        ("0001.captions.json", b"{}"),
        ("0001.jpg", jpeg(1)[:200]),
    ],
)
def test_a_member_that_cannot_be_used_is_a_broken_sample(tmp_path, name, content):
    members = {}
    for n in range(8):
        members |= {f"{n:04}.jpg": jpeg(n), f"{n:04}.txt": b"%d" % n}
        if n == 1:
            members[name] = content
    path = write_tar(tmp_path / "a.tar", members)
    batches = mixture(str(path), cache=tmp_path, batch_size=4)
    tallies = [read(batches, step)[2][0] for step in range(2)]
    assert sum(t.failed for t in tallies) == 1
    assert [name for t in tallies for name in t.unreadable] == [f"{path}: 0001"]


@pytest.mark.parametrize("indexed", [False, True])
def test_what_a_shard_lost_since_it_was_counted_are_broken_samples(tmp_path, indexed):
    source = write_shards(tmp_path, [8])
    batches = mixture(source, cache=tmp_path, batch_size=4)
    if indexed:
        batches.sets[0].samples(0)
    path = tmp_path / "000.tar"
    path.write_bytes(path.read_bytes()[: 7 * 2048])
    tallies = [read(batches, step)[2][0] for step in range(2)]
    reason = "the file ends" if indexed else "no longer what it was"
    assert any(reason in why for t in tallies for why in t.unreadable.values())


def test_more_than_the_limit_is_fatal_from_ten_samples_on(tmp_path):
    source = write_shards(tmp_path / "nine", [40], broken=range(9))
    readers = Readers(mixture(source, cache=tmp_path), 0)
    for step in range(14):
        readers.batch(step)
    assert len(readers.unreadable) == 9
    source = write_shards(tmp_path / "ten", [40], broken=range(10))
    readers = Readers(mixture(source, cache=tmp_path), 0)
    with pytest.raises(DataError, match=r"shards: \d+ of \d+ images are unreadable, more than 1\.0%: .*000\.tar: 000"):
        for step in range(14):
            readers.batch(step)
    tolerant = Readers(mixture(source, cache=tmp_path), 0, max_unreadable=0.5)
    for step in range(14):
        tolerant.batch(step)
    assert len(tolerant.unreadable) == 10


def test_the_share_is_of_samples_tried(tmp_path):
    found = Unreadable(0.25)
    from evaclip.data.mixture import Tally

    found.add(Tally(44, 10, {str(n): "" for n in range(10)}))
    found.add(Tally(36, 10, {str(n): "" for n in range(10)}))
    with pytest.raises(DataError, match="21 of 80 images"):
        found.add(Tally(0, 1, {"0": ""}))


def test_a_set_of_nothing_but_broken_samples_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", {name: BROKEN for n in range(8) for name in (f"{n}.jpg", f"{n}.txt")})
    with pytest.raises(DataError, match=r"100 samples in a row cannot be read, the last one .*a\.tar: \d"):
        read(mixture(str(path), cache=tmp_path, batch_size=4), 0)


def test_a_caption_outside_the_vocabulary_ends_the_run_with_its_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x.jpg": jpeg(0), "x.txt": b"eleven"})
    with pytest.raises(DataError, match=r"a\.tar: x: WordTokenizer: 'eleven'"):
        read(mixture(str(path), cache=tmp_path, batch_size=1), 0)


def test_a_set_that_cannot_fill_its_part_of_a_batch_is_an_error(tmp_path):
    source = write_shards(tmp_path, [3, 2])
    with pytest.raises(ValueError, match=r"has 5 samples with an image and a caption, but a batch of 6 takes 6 of it"):
        mixture(source, cache=tmp_path)


def picture(width, height):
    """Shapes and edges as photographs have them, as a JPEG."""
    y, x = np.mgrid[:height, :width] / 100
    waves = np.stack([np.sin(7 * x + c) + np.cos(5 * y * x + c) + np.sign(np.sin(2 * x + 3 * y)) for c in range(3)], -1)
    Image.fromarray((waves * 40 + 128).clip(0, 255).astype(np.uint8)).save(out := io.BytesIO(), "JPEG", quality=90)
    return out.getvalue()


@pytest.mark.parametrize("size", [(300, 200), (500, 333), (801, 533), (640, 1000), (1000, 667), (1999, 1501)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_fast_decoding_is_nearer_to_exact_than_bilinear_resizing_or_half_a_pixel(size, channels):
    data, transform = picture(*size), image_transform(64, mode="train", channels=channels)
    fast = transform.random_pixels(data, np.random.default_rng(3), decode="fast", name="x").astype(float)
    image = open_bytes(data, channels)
    box = random_crop(*image.size, np.random.default_rng(3))
    exact = transform.random_pixels(data, np.random.default_rng(3), decode="exact", name="x")
    assert np.array_equal(exact, transform.pixels(image, box))
    # Fast decoding moves the box to whole pixels of the smaller image; the same box is compared.
    scale = next(s for s in (8, 4, 2, 1) if s <= min((box[2] - box[0]) // 64, (box[3] - box[1]) // 64))
    snapped = [scale * min(round(at / scale), end // scale) for at, end in zip(box, image.size * 2, strict=True)]
    assert np.abs(np.subtract(snapped, box)).max() < scale

    def error(by: np.ndarray) -> float:
        return np.square(by.astype(float) - transform.pixels(image, tuple(snapped))).mean()

    bilinear = np.array(image.crop(snapped).resize((64, 64), Image.Resampling.BILINEAR)).reshape(64, 64, -1)
    half = round((box[2] - box[0]) / 64 / 2)  # of a pixel of the result
    shifted = transform.pixels(image, (snapped[0] + half, snapped[1], snapped[2] + half, snapped[3]))
    assert error(fast) < error(bilinear.transpose(2, 0, 1)) and error(fast) < error(shifted)
    if scale == 1:
        assert np.abs(fast - exact).max() <= 1  # rounding


@pytest.mark.parametrize(("side", "read"), [(127, 127), (128, 64), (255, 128), (256, 64), (512, 64), (513, 65)])
def test_fast_decoding_reads_no_more_of_a_jpeg_than_it_needs(side, read, monkeypatch):
    """The crop is at least 90 % of the area: a side of 64 is cut from twice 64 pixels only where the box allows it."""
    sizes = []
    monkeypatch.setattr("evaclip.data.preprocess.random_crop", lambda w, h, random, scale: (0, 0, w, h))
    monkeypatch.setattr("evaclip.data.preprocess.read_image", lambda image, channels: sizes.append(image.size) or image)
    data = picture(side, side)
    image_transform(64, mode="train").random_pixels(data, np.random.default_rng(0), decode="fast", name="x")
    assert sizes == [(read, read)]


def test_only_jpegs_are_decoded_smaller():
    image = open_bytes(picture(300, 200))
    image.save(out := io.BytesIO(), "PNG")
    transform = image_transform(32, mode="train")
    fast, exact = (
        transform.random_pixels(out.getvalue(), np.random.default_rng(0), decode=decode, name="x").astype(int)
        for decode in ("fast", "exact")
    )
    assert np.abs(fast - exact).max() <= 1  # rounding


def test_grey_batches_have_one_channel(tmp_path):
    source = write_shards(tmp_path, [6])
    batches = mixture(source, cache=tmp_path, transform=image_transform(8, mode="train", channels=1))
    assert read(batches, 0)[0].shape == (6, 1, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_a_batch_are_normalised_as_those_of_one_image(channels):
    image = open_bytes(jpeg(3))
    transform = image_transform(8, mode="squash", channels=channels)
    pixels = torch.from_numpy(transform.pixels(image))
    assert torch.equal(normalized(pixels[None].expand(2, -1, -1, -1))[1], transform(image))
    assert NUMBERS("3")[0, 1] == 5
