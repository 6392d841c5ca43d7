"""Recall in both directions, against a count over the full matrix in numpy."""

import importlib

import numpy as np
import pytest
import torch

from evaclip.evaluate import retrieval

NAMES = [f"{direction}@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


def features(count, width=16, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def owners(images, texts, seed=2):
    """Every image has a text, some have several, in no order."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=generator)])
    return owner[torch.randperm(texts, generator=generator)]


def by_numpy(images, texts, owner):
    images, texts, owner = (np.asarray(x, dtype=np.float64) for x in (images, texts, owner))
    scores = images @ texts.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    forth, back = [], []
    for i, row in enumerate(scores):
        best = row[owner == i].max()
        forth.append(sum(s >= best for s, o in zip(row, owner, strict=True) if o != i))
    for t, column in enumerate(scores.T):
        own = int(owner[t])
        back.append(sum(s >= column[own] for i, s in enumerate(column) if i != own))
    at = {"image_to_text": np.array(forth), "text_to_image": np.array(back)}
    return {f"{direction}@{k}": np.mean(ranks < k) for direction, ranks in at.items() for k in (1, 5, 10)}


@pytest.mark.parametrize("at_once", [1, 1000, 2**24])
@pytest.mark.parametrize("texts", [60, 150])
def test_recalls_are_those_of_brute_force(texts, at_once):
    owner = owners(60, texts)
    images = features(60)
    captions = images[owner] + 1.5 * features(texts, seed=1)
    result = retrieval(images, captions, owner, scores_at_once=at_once)
    expected = by_numpy(images, captions, owner)
    assert {name: result[name] for name in NAMES} == pytest.approx(expected)
    assert 0.1 < expected["image_to_text@1"] < expected["image_to_text@10"] < 1  # neither trivial nor hopeless
    assert result["mean_recall"] == pytest.approx(np.mean(list(expected.values())))
    assert (result["images"], result["texts"]) == (60, texts)


def test_an_image_is_found_by_any_of_its_captions():
    images = torch.eye(3)
    texts = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
    owner = torch.tensor([0, 1, 0, 2])  # the first caption of image 0 is wrong, the second right
    result = retrieval(images, texts, owner)
    assert result["image_to_text@1"] == pytest.approx(2 / 3)  # image 2 shares its score with a caption of image 0
    assert result["text_to_image@1"] == pytest.approx(3 / 4)


def test_equal_scores_count_against_the_model():
    images, texts = torch.ones(12, 4), torch.ones(12, 4)
    result = retrieval(images, texts, torch.arange(12))
    assert all(result[name] == 0 for name in NAMES)
    five = retrieval(images[:5], texts[:5], torch.arange(5))
    assert [five[name] for name in NAMES] == [0, 1, 1, 0, 1, 1]  # of five, each is among the first five


def test_captions_of_one_image_do_not_compete():
    images, texts = torch.eye(2), torch.eye(2)[[0, 0, 0, 0, 0, 0, 1]]
    result = retrieval(images, texts, torch.tensor([0, 0, 0, 0, 0, 0, 1]))
    assert all(result[name] == 1 for name in NAMES)


def test_lengths_of_features_do_not_matter():
    owner = owners(40, 90)
    images, texts = features(40), features(90, seed=1) + features(40)[owner]
    lengths = 0.1 + features(130, 1, seed=3).abs()
    scaled = retrieval(images * lengths[:40], texts * lengths[40:], owner)
    assert scaled == retrieval(images, texts, owner)


def test_scores_are_float32_even_for_half_precision_features_and_under_autocast():
    owner = owners(200, 300)
    images = features(200, 8).bfloat16()
    texts = (images[owner] + features(300, 8, seed=1)).bfloat16()
    expected = retrieval(images.float(), texts.float(), owner)
    with torch.autocast("cpu", torch.bfloat16):
        assert retrieval(images, texts, owner) == expected


def test_no_full_matrix_is_held(monkeypatch):
    module = importlib.import_module("evaclip.evaluate.retrieval")
    shapes = []

    def spy(a, b, scores=module.scores):
        shapes.append((len(a), len(b)))
        return scores(a, b)

    monkeypatch.setattr(module, "scores", spy)
    retrieval(features(100), features(250, seed=1), owners(100, 250), scores_at_once=1000)
    assert max(a * b for a, b in shapes) <= 1000
    assert sum(a * b for a, b in shapes) == 2 * 100 * 250


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"owner": torch.tensor([0, 1])}, r"one integer for each of the 3 texts"),
        ({"owner": torch.tensor([0.0, 1, 2])}, r"image_of_text is torch.float32"),
        ({"owner": torch.tensor([0, 1, 3])}, "between 0 and 3, but there are 3 images"),
        ({"owner": torch.tensor([0, 1, -1])}, "between -1 and 1"),
        ({"owner": torch.tensor([0, 1, 1])}, "1 of 3 images have no text"),
        ({"images": torch.ones(3, 5)}, r"image features \(3, 5\) and text features \(3, 4\)"),
        ({"images": torch.ones(0, 4)}, r"\(n, E\) and \(m, E\) with n of 1 or more"),
        ({"images": torch.full((3, 4), torch.nan)}, "not finite"),
        ({"texts": torch.full((3, 4), torch.inf)}, "not finite"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(change, sentence):
    arguments = {"images": torch.ones(3, 4), "texts": torch.ones(3, 4), "owner": torch.arange(3)} | change
    with pytest.raises(ValueError, match=sentence):
        retrieval(*arguments.values())
