"""Reading checkpoints: all or nothing."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

import evaclip

NAME = "EVA02-CLIP-tiny"


def state():
    """Native weights of another model of the same shape."""
    torch.manual_seed(1)
    return evaclip.create_model(NAME).state_dict()


def model():
    torch.manual_seed(2)
    return evaclip.create_model(NAME)


def same(weights, other):
    return weights.keys() == other.keys() and all(torch.equal(weights[key], other[key]) for key in weights)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    weights = state()
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    target = model()
    report = evaclip.load_checkpoint(target, path)
    assert same(target.state_dict(), weights)
    assert same(evaclip.create_model(NAME, checkpoint=path).state_dict(), weights)
    assert report.tensors == len(weights)
    assert report.parameters == sum(p.numel() for p in target.parameters())
    assert str(report) == f"{path}: {report.tensors} tensors of float32, {report.parameters:,} parameters"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"module": s},
        lambda s: {"state_dict": {f"module.{key}": value for key, value in s.items()}, "name": "run"},
        lambda s: {"model": {"module": s}},
        lambda s: {f"module.{key}": value for key, value in s.items()},
    ],
)
def test_wrappers_and_a_leading_module_are_taken_off(tmp_path, wrap):
    weights = state()
    torch.save(wrap(weights), tmp_path / "w.pt")
    target = model()
    evaclip.load_checkpoint(target, tmp_path / "w.pt")
    assert same(target.state_dict(), weights)


def test_files_from_before_torch_1_6_are_read(tmp_path):
    weights = state()
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    target = model()
    evaclip.load_checkpoint(target, tmp_path / "w.pt")
    assert same(target.state_dict(), weights)


def test_rotary_tables_are_ignored_and_computed(tmp_path):
    weights = state()
    tables = {"visual.rope.freqs_cos": torch.zeros(256, 64), "visual.blocks.0.attn.rope.freqs_sin": torch.zeros(2)}
    torch.save(weights | tables, tmp_path / "w.pt")
    target = model()
    report = evaclip.load_checkpoint(target, tmp_path / "w.pt")
    assert sorted(report.ignored) == sorted(tables)
    assert "2 rotary tables ignored" in str(report)
    images = torch.randn(2, 3, 32, 32)
    torch.save(weights, tmp_path / "plain.pt")
    plain = evaclip.create_model(NAME, checkpoint=tmp_path / "plain.pt")
    assert torch.equal(plain.encode_image(images), target.encode_image(images))


def test_tensors_take_the_dtype_of_the_parameter(tmp_path):
    weights = {key: value.half() for key, value in state().items()}
    torch.save(weights, tmp_path / "w.pt")
    target = evaclip.create_model(NAME, checkpoint=tmp_path / "w.pt", dtype=torch.bfloat16)
    loaded = target.state_dict()
    assert (target.logit_scale.dtype, loaded["visual.pos_embed"].dtype) == (torch.float32, torch.bfloat16)
    assert all(torch.equal(loaded[key], weights[key].to(loaded[key].dtype)) for key in weights)


def test_every_misfit_is_listed_and_nothing_is_changed(tmp_path):
    weights = state()
    del weights["visual.norm.bias"], weights["text.ln_final.weight"]
    weights["visual.head.scale"] = torch.zeros(2)
    weights["text.extra"] = torch.zeros(3, 1)
    weights["visual.pos_embed"] = torch.zeros(1, 26, 64)
    torch.save(weights, tmp_path / "w.pt")
    target = model()
    with pytest.raises(ValueError) as error:
        evaclip.load_checkpoint(target, tmp_path / "w.pt")
    for line in (
        f"{tmp_path / 'w.pt'} does not fit the model, which is unchanged:",
        "missing: visual.norm.bias (64,)",
        "missing: text.ln_final.weight (64,)",
        "unexpected: visual.head.scale (2,)",
        "unexpected: text.extra (3, 1)",
        "reshaped: visual.pos_embed is (1, 26, 64), the model's (1, 17, 64)",
    ):
        assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 6
    assert same(target.state_dict(), model().state_dict())


def test_another_dialect_is_named_by_its_keys(tmp_path):
    keys = ("vision_model.embeddings.class_embedding", "visual_projection.weight")
    torch.save({key: torch.zeros(2) for key in keys}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"another dialect: its 2 keys look like 'vision_model.embeddings.class_emb"):
        evaclip.load_checkpoint(model(), tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, suffix, share):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    target = model()
    with pytest.raises(ValueError, match=rf"cannot read .*weights{suffix}: truncated, damaged or"):
        evaclip.load_checkpoint(target, path)
    assert same(target.state_dict(), model().state_dict())


def test_files_that_hold_no_weights_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*w\.pt"):
        evaclip.load_checkpoint(model(), path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="holds list, not a dictionary of tensors by name"):
        evaclip.load_checkpoint(model(), path)
    torch.save({"weights": state(), "epoch": 3}, path)
    with pytest.raises(ValueError, match="entries that are no tensors: 'weights', 'epoch'"):
        evaclip.load_checkpoint(model(), path)
    torch.save({"model": state(), "args": argparse.Namespace(lr=1.0)}, path)
    with pytest.raises(ValueError, match=r"cannot read .*not a file of tensors alone"):
        evaclip.load_checkpoint(model(), path)


def test_a_model_without_storage_is_refused(tmp_path):
    torch.save(state(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"a model on the meta device cannot hold .*to_empty"):
        evaclip.create_model(NAME, checkpoint=tmp_path / "w.pt", device="meta")
