"""Folders of images with labels or captions, and the training batches drawn from them."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from evaclip.data import CaptionBatches, ImageCaptions, ImageError, ImageFolder, image_transform, normalized

TRAIN, EVAL = image_transform(8, mode="train"), image_transform(8, mode="squash")


def save(path, value=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(value)
    Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def captioned(root, count, broken=()):
    """Images 000.png ... whose captions say their number; two captions each."""
    for i in range(count):
        save(root / f"{i:03}.png", i)
        (root / f"{i:03}.txt").write_text(f"number {i}\nimage {i}\n")
    for i in broken:
        (root / f"{i:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return ImageCaptions(root)


def numbers(captions):
    return [int(caption.split()[1]) for caption in captions]


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    for i, name in enumerate(["zebra/2.png", "zebra/10.jpg", "guide_dog/b/x.PNG", "guide_dog/a.webp"]):
        save(tmp_path / name, i)
    (tmp_path / "zebra" / "notes.txt").write_text("no image")
    save(tmp_path / ".cache" / "x.png")
    save(tmp_path / "zebra" / ".hidden.png")
    folder = ImageFolder(tmp_path)
    assert folder.classes == ["guide dog", "zebra"] and folder.labels == [0, 0, 1, 1]
    names = [p.relative_to(tmp_path).as_posix() for p in folder.images]
    assert names == ["guide_dog/a.webp", "guide_dog/b/x.PNG", "zebra/10.jpg", "zebra/2.png"]


def test_labelled_batches_hold_every_image_once_in_order(tmp_path):
    for i in range(7):
        save(tmp_path / f"class{i % 2}" / f"{i}.png", i)
    folder = ImageFolder(tmp_path)
    batches = list(folder.batches(3, EVAL))
    assert [tuple(x.shape) for x, _ in batches] == [(3, 3, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8)]
    assert torch.cat([y for _, y in batches]).tolist() == folder.labels
    expected = torch.stack([EVAL(Image.open(p)) for p in folder.images])
    assert torch.equal(torch.cat([x for x, _ in batches]), expected)


def test_evaluation_leaves_no_image_out(tmp_path):
    captioned(tmp_path / "a", 4, broken=[2])
    with pytest.raises(ImageError, match=r"002\.png"):
        list(ImageFolder(tmp_path).batches(2, EVAL))


def test_folders_that_are_no_classes_are_errors(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere")
    save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="has no subfolders"):
        ImageFolder(tmp_path)
    with pytest.raises(ValueError, match=r"x\.png is no folder"):
        ImageFolder(tmp_path / "x.png")
    (tmp_path / "a_b").mkdir()
    with pytest.raises(ValueError, match=r"a_b holds no image \(\.jpg"):
        ImageFolder(tmp_path)
    save(tmp_path / "a_b" / "x.png")
    save(tmp_path / "a b" / "x.png")
    with pytest.raises(ValueError, match="are both the class 'a b'; rename one"):
        ImageFolder(tmp_path)


def test_captions_lie_beside_their_images_one_per_line(tmp_path):
    for name, text in {"b": "two\n\n  lines \n", "a": "one", "sub/c": "\ufeffwith mark"}.items():
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "README.txt").write_text("not a caption")
    pairs = ImageCaptions(tmp_path)
    assert [p.stem for p in pairs.images] == ["a", "b", "c"]
    assert pairs.captions == [["one"], ["two", "lines"], ["with mark"]]
    texts, owner = pairs.flat()
    assert texts == ["one", "two", "lines", "with mark"] and owner.tolist() == [0, 1, 1, 2]
    assert torch.cat(list(pairs.batches(2, EVAL))).shape == (3, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'image,caption\nb.png,"one, two"\na.png,first\nb.png,again\n'),
        ("t.tsv", "title\tfilepath\textra\none, two\tb.png\tx\nfirst\ta.png\tx\nagain\tb.png\tx\n"),
        ("tabs.csv", "filepath\ttitle\nb.png\tone, two\na.png\tfirst\nb.png\tagain\n"),
        (
            "t.jsonl",
            '{"image": "b.png", "caption": ["one, two", "again"]}\n\n{"filepath": "a.png", "title": "first"}\n',
        ),
    ],
)
def test_tables_name_images_and_captions(tmp_path, name, content):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    (tmp_path / name).write_text(content)
    pairs = ImageCaptions(tmp_path / name)
    assert [p.name for p in pairs.images] == ["b.png", "a.png"]
    assert pairs.captions == [["one, two", "again"], ["first"]]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", "image,text\na.png,x\n", r"line 2 has no column 'caption' or 'title', only 'image', 'text'"),
        ("t.csv", "path,caption\na.png,x\n", r"line 2 has no column 'image' or 'filepath'"),
        ("t.csv", "image,caption\n,x\n", r"line 2: image '', caption 'x'; a path"),
        ("t.csv", "image,caption\na.png,\n", r"1 image\(s\) of .* have no caption: .*a\.png"),
        ("t.csv", "image,caption\nnone.png,x\n", r"1 image\(s\) of .* do not exist: .*none\.png"),
        ("t.csv", "image,caption\n", "holds no image"),
        ("t.csv", b"image,caption\na.png,caf\xe9\n", "is not UTF-8"),
        ("t.jsonl", '{"image": "a.png"\n', "line 1 is no JSON"),
        (
            "t.tsv",
            'filepath\ttitle\na.png\t"one\nb.png\ttwo\n',
            "after line 1: .*; a caption with a quote is",
        ),
        ("t.jsonl", '{"image": "a.png", "caption": 3}\n', "caption 3; a path and a text"),
        ("t.jsonl", "[1]\n", "has no column 'image' or 'filepath', only none"),
        ("t.xml", "<a/>", r"neither a folder nor a table \(\.csv, \.tsv, \.jsonl\)"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error(tmp_path, name, content, sentence):
    save(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence):
        ImageCaptions(tmp_path / name)


def test_folders_without_captions_are_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        ImageCaptions(tmp_path)
    for i in range(5):
        save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("zero")
    (tmp_path / "1.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"4 image\(s\) of .* have no caption: .*1\.png, .* and 1 more"):
        ImageCaptions(tmp_path)
    save(tmp_path / "0.jpg")
    with pytest.raises(ValueError, match=r"0\.jpg and .*0\.png share the caption .*0\.txt; rename"):
        ImageCaptions(tmp_path)


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    pairs = captioned(tmp_path, 20)
    first = CaptionBatches(pairs, 6, seed=3, transform=TRAIN)
    steps = [first.batch(step) for step in range(9)]
    later = CaptionBatches(pairs, 6, seed=3, transform=TRAIN, workers=1)
    for step in (8, 2, 5):  # as a run does that goes on from a checkpoint
        images, captions = later.batch(step)
        assert torch.equal(images, steps[step][0]) and captions == steps[step][1]
    assert steps[0][1] != CaptionBatches(pairs, 6, seed=4, transform=TRAIN).batch(0)[1]


def test_an_epoch_is_a_permutation_without_its_incomplete_last_batch(tmp_path):
    data = CaptionBatches(captioned(tmp_path, 20), 6, seed=0, transform=TRAIN)
    assert data.batches_per_epoch == 3
    epochs = [[n for s in range(3) for n in numbers(data.batch(3 * e + s)[1])] for e in range(12)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 12
    assert {n for epoch in epochs for n in epoch} == set(range(20))  # what was dropped comes in other epochs


def test_captions_belong_to_their_images_and_all_are_drawn(tmp_path):
    pairs = captioned(tmp_path, 10)
    data = CaptionBatches(pairs, 5, seed=0, transform=EVAL)
    known = [EVAL(Image.open(path)) for path in pairs.images]
    drawn = set()
    for step in range(40):
        images, captions = data.batch(step)
        assert all(torch.equal(x, known[n]) for x, n in zip(normalized(images), numbers(captions), strict=True))
        drawn.update(captions)
    assert drawn == {c for captions in pairs.captions for c in captions}


def test_crops_differ_between_epochs_and_not_within_one(tmp_path):
    data = CaptionBatches(captioned(tmp_path, 1), 1, seed=0, transform=TRAIN)
    crops = [data.batch(epoch)[0] for epoch in range(8)]
    assert torch.equal(crops[3], data.batch(3)[0])
    assert len({crop.numpy().tobytes() for crop in crops}) > 1


def test_an_unreadable_image_is_reported_and_replaced_by_the_one_at_its_place_in_the_next_batch(tmp_path, caplog):
    whole = CaptionBatches(captioned(tmp_path, 20), 6, seed=0, transform=EVAL)
    order = [numbers(whole.batch(step)[1]) for step in range(3)]
    broken = [order[0][2], order[0][4], order[1][2]]
    pairs = captioned(tmp_path, 20, broken=broken)
    data = CaptionBatches(pairs, 6, seed=0, transform=EVAL)
    with caplog.at_level(logging.WARNING):
        images, captions = data.batch(0)
    # The one at the place of the first in the next batch is unreadable itself: that in the batch after it follows.
    expected = list(order[0])
    expected[2], expected[4] = order[2][2], order[1][4]
    assert numbers(captions) == expected and len(images) == 6
    assert sorted(data.unreadable) == sorted(pairs.images[i] for i in broken)
    assert all(f"{i:03}.png" in caplog.text for i in broken)
    data.batch(0)
    assert len(caplog.records) == 3  # each is reported once
    resumed = CaptionBatches(pairs, 6, seed=0, transform=EVAL)
    for step in (2, 1, 0):
        assert numbers(resumed.batch(step)[1]) == numbers(data.batch(step)[1])
        assert len(set(numbers(resumed.batch(step)[1]))) == 6


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_parts_of_all_ranks_are_the_batch_also_around_broken_images(tmp_path, world):
    pairs = captioned(tmp_path, 20, broken=[3, 8, 11])
    whole = CaptionBatches(pairs, 6, seed=0, transform=TRAIN)
    ranks = [CaptionBatches(pairs, 6, seed=0, transform=TRAIN, rank=rank, world=world) for rank in range(world)]
    for step in range(4):
        images, captions = whole.batch(step)
        parts = [rank.batch(step) for rank in ranks]
        assert torch.equal(torch.cat([part for part, _ in parts]), images)
        assert [caption for _, part in parts for caption in part] == captions


def test_nine_unreadable_images_are_never_fatal_and_ten_are(tmp_path):
    data = CaptionBatches(captioned(tmp_path / "nine", 30, broken=range(9)), 10, seed=0, transform=EVAL)
    for step in range(6):
        data.batch(step)
    assert len(data.unreadable) == 9
    ten = captioned(tmp_path / "ten", 30, broken=range(10))
    data = CaptionBatches(ten, 10, seed=0, transform=EVAL)
    with pytest.raises(RuntimeError, match=r"10 of \d+ images are unreadable, more than 1\.0%: .* and 7 more; mend"):
        for step in range(6):
            data.batch(step)
    tolerant = CaptionBatches(ten, 10, seed=0, transform=EVAL, max_unreadable=0.5)
    assert all(len(tolerant.batch(step)[1]) == 10 for step in range(6))


def test_too_few_readable_images_for_a_batch_are_an_error(tmp_path):
    data = CaptionBatches(captioned(tmp_path, 6, broken=[1]), 6, seed=0, transform=EVAL)
    with pytest.raises(RuntimeError, match=r"a batch of 6 cannot be filled from 6 images, 1 of them unreadable"):
        data.batch(0)


@pytest.mark.parametrize("size", [0, 4])
def test_a_batch_larger_than_the_data_set_is_an_error(tmp_path, size):
    with pytest.raises(ValueError, match=f"batch_size is {size}, but there are 3 images; choose 1 to 3"):
        CaptionBatches(captioned(tmp_path, 3), size, seed=0, transform=TRAIN)


def test_grey_batches_have_one_channel(tmp_path):
    data = CaptionBatches(captioned(tmp_path, 3), 2, seed=0, transform=image_transform(8, mode="train", channels=1))
    assert data.batch(0)[0].shape == (2, 1, 8, 8)


def test_captions_of_jsonl_may_hold_line_separators(tmp_path):
    save(tmp_path / "a.png")
    row = json.dumps({"image": "a.png", "caption": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "t.jsonl").write_text(row + "\n", encoding="utf-8")
    assert ImageCaptions(tmp_path / "t.jsonl").captions == [["one\u2028two"]]
