"""Handwritten numbers and their names."""

import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from evaclip.data import Digits, digits

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def cells(images, length=3):
    """(B, 1, 8, 8 L) -> B L rows of 64 pixels, in reading order."""
    return images.view(len(images), 8, length, 8).permute(0, 2, 1, 3).reshape(-1, 64)


def source(cell_rows):
    """The index in scikit-learn's data of each digit image."""
    known = {(row.astype(np.float32) / 8 - 1).tobytes(): i for i, row in enumerate(load_digits().data)}
    return [known[row.numpy().tobytes()] for row in cell_rows]


def numbers(captions):
    return [int("".join(str(WORDS.index(word)) for word in caption.split())) for caption in captions]


def test_each_caption_names_the_digits_of_its_image():
    labels = load_digits().target
    for images, captions in (Digits(64, shift=0).batch(3), Digits(64).held_out(100)):
        assert images.dtype == torch.float32 and images.shape == (len(captions), 1, 8, 24)
        written = [WORDS[labels[i]] for i in source(cells(images))]
        assert [" ".join(written[i : i + 3]) for i in range(0, len(written), 3)] == captions
        assert images.min() == -1 and images.max() == 1


def test_a_batch_is_a_function_of_seed_and_step():
    first = Digits(32, seed=1)
    for step in (0, 7, 10**12):
        images, captions = first.batch(step)
        again, same = Digits(32, seed=1).batch(step)
        assert torch.equal(images, again) and captions == same
    assert first.batch(0)[1] != first.batch(1)[1]
    assert first.batch(0)[1] != Digits(32, seed=2).batch(0)[1]


def test_no_caption_comes_twice_in_a_batch_and_all_training_numbers_come():
    data = Digits(128)
    seen = set()
    for step in range(40):
        captions = data.batch(step)[1]
        assert len(set(captions)) == 128
        seen.update(numbers(captions))
    assert seen == set(data.train_numbers.tolist())


def test_numbers_and_handwriting_of_training_and_test_are_disjoint():
    data = Digits(256, shift=0)
    trained = [data.batch(step) for step in range(20)]
    images, captions = data.held_out()
    assert not set(numbers(captions)) & {n for _, c in trained for n in numbers(c)}
    hands = {i for x, _ in trained for i in source(cells(x))}
    tested = set(source(cells(images)))
    assert not hands & tested
    assert len(hands) == 1437 and len(tested) == 360  # all of the handwriting is in use


def test_training_digits_are_shifted_each_by_itself_and_by_fractions_of_a_pixel():
    still, captions = Digits(64, shift=0).batch(0)
    moved, same = Digits(64).batch(0)
    assert captions == same
    # The centre of a digit's ink moves by up to 0.35 pixels down and right (a little less where ink leaves the image).
    centres = []
    for images in (still, moved):
        ink = (cells(images) + 1).view(-1, 8, 8)
        place = torch.arange(8.0)
        total = ink.sum((1, 2))
        centres.append(torch.stack([ink.sum(2) @ place / total, ink.sum(1) @ place / total]))
    by = centres[1] - centres[0]
    assert by.abs().max() < 0.36 and by.std() > 0.15 and by.mean().abs() < 0.05
    ink = torch.full((2, 8, 8), -1.0).numpy()
    ink[:, 3, 4] = 1
    down, left = digits._shifted(ink, np.float32([[0.25, 0.0], [0.0, -1.0]]))
    assert down[3, 4] == 0.5 and down[4, 4] == -0.5 and (down == -1).sum() == 62
    assert left[3, 3] == 1 and (left == -1).sum() == 63


def test_held_out_is_the_same_for_every_seed_and_shows_each_unseen_number_twice():
    images, captions = Digits(16, seed=0).held_out(1000)
    again, same = Digits(64, seed=9).held_out(1000)
    assert torch.equal(images, again) and captions == same
    assert sorted(numbers(captions)) == sorted(2 * Digits(16).test_numbers.tolist())
    assert len(set(captions[:500])) == 500
    assert len({image.numpy().tobytes() for image in images}) == 1000


def test_captions_are_all_numbers_in_numeric_order():
    captions = Digits(16).captions
    assert len(captions) == 1000 and captions[703] == "seven zero three"
    assert numbers(captions) == list(range(1000))


def test_length_and_fraction_set_shapes_and_splits():
    data = Digits(9, length=1, train_fraction=0.9)
    assert (len(data.train_numbers), len(data.test_numbers)) == (9, 1)
    assert data.batch(0)[0].shape == (9, 1, 8, 8) and data.image_size == (8, 8)
    assert Digits(4, length=4).batch(0)[0].shape == (4, 1, 8, 32)


def test_the_tokenizer_knows_every_caption():
    data = Digits(8)
    tokenizer = data.tokenizer()
    ids = tokenizer(data.captions)
    assert ids.shape == (1000, 5) and tokenizer.vocabulary_size == 13
    assert ids[703].tolist() == [1, 9, 2, 5, 12]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": 501}, "batch_size is 501, but there are 500 training numbers"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 8, "length": 7}, "length is 7; numbers of 1 to 6 digits"),
        ({"batch_size": 8, "train_fraction": 0.0}, "train_fraction is 0.0"),
        ({"batch_size": 8, "shift": 1.5}, "shift is 1.5; digits move by 0 to 1 pixels"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Digits(**arguments)


def test_a_seed_or_step_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="seed of -1"):
        Digits(8, seed=-1).batch(0)
    with pytest.raises(ValueError, match="place of -1"):
        Digits(8).batch(-1)


def test_without_held_out_numbers_asking_for_them_is_an_error():
    with pytest.raises(ValueError, match="no number is held out"):
        Digits(8, train_fraction=1.0).held_out()


def test_without_scikit_learn_the_error_says_how_to_get_it(monkeypatch):
    digits._handwriting.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'evakernels\[train\]'"):
        Digits(8)
