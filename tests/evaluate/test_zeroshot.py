"""Zero-shot classification with a model whose features are known."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from evaclip.data import ImageFolder, WordTokenizer, image_transform
from evaclip.evaluate import TEMPLATES, classifier, encode_images, encode_texts, load_templates, zero_shot

TEMPLATES_2 = ("a photo of a {}", "one {} here")
WORDS = ["a", "photo", "of", "one", "here"]


class Known(nn.Module):
    """An image's feature is its first E pixels; a text's is the sum of its tokens' rows of a random table."""

    def __init__(self, vocabulary, width=6, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, width, generator=generator))
        self.dropout = nn.Dropout(0.5)  # a mistake of mode shows at once
        self.calls = []

    def encode_image(self, images):
        self.calls.append(len(images))
        return self.dropout(images.flatten(1)[:, : self.table.shape[1]]) * 3

    def encode_text(self, ids):
        self.calls.append(len(ids))
        return self.dropout(self.table[ids].sum(1)) * 5


def setting(classes, width=6):
    names = [f"class{i}" for i in range(classes)]
    tokenizer = WordTokenizer([*WORDS, *names], context=8)
    return Known(tokenizer.vocabulary_size, width), tokenizer, names


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_numpy(model, tokenizer, names, templates):
    table = model.table.detach().double().numpy()
    rows = []
    for name in names:
        texts = [tokenizer(t.replace("{}", name))[0].numpy() for t in templates]
        rows.append(unit(np.mean([unit(table[ids].sum(0)) for ids in texts], axis=0)))
    return np.array(rows)


def batches(count, classes, width=6, size=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 2, width, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return images, labels, list(zip(images.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 256])
def test_classifier_is_the_renormalised_mean_of_normalised_text_features(batch_size):
    model, tokenizer, names = setting(5)
    weight = classifier(model, tokenizer, names, TEMPLATES_2, batch_size=batch_size)
    assert weight.shape == (6, 5) and weight.dtype == torch.float32
    expected = torch.from_numpy(by_numpy(model, tokenizer, names, TEMPLATES_2).T)
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)
    assert max(model.calls) <= batch_size


@pytest.mark.parametrize("classes", [3, 5, 11])
def test_metrics_are_those_of_brute_force(classes):
    model, tokenizer, names = setting(classes)
    images, labels, data = batches(200, classes)
    result = zero_shot(model, tokenizer, data, names, TEMPLATES_2)
    features = unit(images.flatten(1)[:, :6].double().numpy())
    order = np.argsort(-(features @ by_numpy(model, tokenizer, names, TEMPLATES_2).T), axis=1)
    hits = order == labels.numpy()[:, None]
    recalls = [hits[labels.numpy() == c, 0].mean() for c in range(classes)]
    assert result["top1"] == pytest.approx(hits[:, 0].mean())
    assert result["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert result["samples"] == 200
    assert ("top5" in result) == (classes >= 5)
    if classes >= 5:
        assert result["top5"] == pytest.approx(hits[:, :5].any(1).mean())


def test_recall_is_a_mean_over_the_classes_that_occur():
    model, tokenizer, names = setting(4)
    weight = classifier(model, tokenizer, names, TEMPLATES_2).T
    images = weight[[0, 0, 0, 1, 2]].reshape(5, 1, 1, 6)  # class 3 does not occur
    data = [(images, torch.tensor([0, 0, 0, 1, 1]))]
    result = zero_shot(model, tokenizer, data, names, TEMPLATES_2)
    assert (result["top1"], result["mean_per_class_recall"]) == (0.8, 0.75)


def test_images_of_a_folder_are_classified_by_the_names_of_its_classes(tmp_path):
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "dark_blue": (0, 0, 120)}
    for name, colour in colours.items():
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20 + i, 20), colour).save(tmp_path / name / f"{i}.png")

    class Colours:  # no nn.Module, and none is needed
        def encode_image(self, images):
            return images.mean((2, 3))

        def encode_text(self, ids):
            return ids.float()

    def tokenizer(texts):
        known = {name.replace("_", " "): colour for name, colour in colours.items()}
        paint = image_transform(1)
        return torch.stack(
            [paint(Image.new("RGB", (1, 1), next(c for n, c in known.items() if n in t))).flatten() for t in texts]
        )

    folder = ImageFolder(tmp_path)
    result = zero_shot(Colours(), tokenizer, folder.batches(2, image_transform(8)), folder.classes)
    assert result == {"top1": 1.0, "mean_per_class_recall": 1.0, "samples": 9}


def test_every_module_gets_its_mode_back_even_after_an_error():
    model, tokenizer, names = setting(3)
    model.train()
    model.dropout.eval()
    images, _, data = batches(10, 3)
    zero_shot(model, tokenizer, data, names, TEMPLATES_2)
    assert model.training and not model.dropout.training
    model.dropout.train()
    assert torch.equal(encode_images(model, [images]), encode_images(model, [images]))  # no dropout
    with pytest.raises(ValueError, match="image features are not finite"):
        encode_images(model, [images * torch.nan])
    assert model.training and model.dropout.training
    assert not encode_texts(model, tokenizer, ["a photo"]).requires_grad


def test_a_half_precision_model_gets_images_of_its_dtype_and_gives_float32():
    model, tokenizer, names = setting(5)
    images, _, data = batches(40, 5)
    seen = []
    model.bfloat16().encode_image = lambda x: seen.append(x.dtype) or x.flatten(1)[:, :6]
    assert encode_images(model, [images]).dtype == torch.float32
    assert classifier(model, tokenizer, names, TEMPLATES_2).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        inside = zero_shot(model, tokenizer, data, names, TEMPLATES_2)
    assert inside == zero_shot(model, tokenizer, data, names, TEMPLATES_2)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": []}, "no images were given"),
        ({"class_names": []}, "0 classes and 8 templates"),
        ({"templates": []}, "3 classes and 0 templates"),
        ({"templates": ["a photo"]}, r"the template 'a photo' has no \{\}"),
        ({"images": [(torch.ones(1, 1, 2, 6), torch.tensor([3]))]}, "labels 3 to 3 for 3 classes"),
        ({"images": [(torch.ones(1, 1, 2, 6), torch.tensor([-1]))]}, "labels -1 to -1 for 3 classes"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(change, sentence):
    model, _, names = setting(3)
    arguments = {"images": batches(4, 3)[2], "class_names": names, "templates": TEMPLATES} | change

    def tokenizer(texts):
        return torch.ones(len(texts), 3, dtype=torch.long)

    with pytest.raises(ValueError, match=sentence):
        zero_shot(model, tokenizer, **arguments)


def test_no_text_and_no_image_are_errors():
    model, tokenizer, _ = setting(3)
    with pytest.raises(ValueError, match="no text"):
        encode_texts(model, tokenizer, [])
    with pytest.raises(ValueError, match="no batch of images"):
        encode_images(model, [])


def test_templates_are_lines_of_a_file_with_a_place_for_the_name(tmp_path):
    (tmp_path / "t.txt").write_text("\na photo of {}.\n  {} {{x}} and {}\n", encoding="utf-8")
    assert load_templates(tmp_path / "t.txt") == ("a photo of {}.", "{} {{x}} and {}")
    (tmp_path / "t.txt").write_text("ok {}\nnot here\n")
    with pytest.raises(ValueError, match=r"t\.txt, line 2: the template 'not here' has no \{\}"):
        load_templates(tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no template; write one per line, such as 'a photo"):
        load_templates(tmp_path / "t.txt")
    assert len(set(TEMPLATES)) == len(TEMPLATES) and all(t.count("{}") == 1 for t in TEMPLATES)
