"""Reading checkpoints: all or nothing."""

import argparse
import fractions
import zipfile

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
    assert str(report) == f"{path}: native, {report.tensors} tensors of float32, {report.parameters:,} parameters"


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
        f"{tmp_path / 'w.pt'} (native) does not fit the model, which is unchanged:",
        "missing: visual.norm.bias (64,)",
        "missing: text.ln_final.weight (64,)",
        "unexpected: visual.head.scale (2,)",
        "unexpected: text.extra (3, 1)",
        "reshaped: visual.pos_embed is (1, 26, 64), the model's (1, 17, 64); resize='eva' or 'timm' interpolates it",
    ):
        assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 6
    assert same(target.state_dict(), model().state_dict())


def test_keys_of_no_dialect_are_quoted(tmp_path):
    torch.save({"encoder.layer.0.weight": torch.zeros(2), "pooler.bias": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"its 2 keys look like 'encoder.layer.0.weight', 'pooler.bias'; that is none"):
        evaclip.load_checkpoint(model(), tmp_path / "w.pt")


@pytest.mark.parametrize("part", ["visual", "text"])
def test_one_tower_is_read_out_of_a_whole_model(part, tmp_path):
    weights, target = state(), model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    torch.save(weights, tmp_path / "w.pt")
    report = evaclip.load_checkpoint(target, tmp_path / "w.pt", part=part)
    own = {key for key in weights if key.startswith(part + ".")}
    assert same(target.state_dict(), {k: (weights if k in own else before)[k] for k in weights})
    assert report.tensors == len(own) and "logit_scale" in report.unused
    assert f"not used: {report.unused[0]}" in str(report)


@pytest.mark.parametrize(
    ("kept", "part", "words"),
    [
        ("visual.", None, "holds no text tower of EVA-CLIP's kind; part='visual' reads the other one alone"),
        ("text.", None, "holds no image tower of EVA-CLIP's kind; part='text' reads the other one alone"),
        ("text.", "visual", "holds no image tower of EVA-CLIP's kind"),
        ("", "image", "part is 'image'; allowed: 'visual', 'text' or None"),
    ],
)
def test_a_tower_that_is_not_there_is_named(kept, part, words, tmp_path):
    torch.save({key: value for key, value in state().items() if key.startswith(kept)}, tmp_path / "w.pt")
    target = model()
    with pytest.raises(ValueError, match=words):
        evaclip.load_checkpoint(target, tmp_path / "w.pt", part=part)
    assert same(target.state_dict(), model().state_dict())


def test_what_is_skipped_keeps_its_values(tmp_path):
    weights, target = state(), model()
    weights["visual.head.weight"] = torch.zeros(7, 64)  # of another joint space
    before = target.visual.head.weight.clone()
    torch.save(weights, tmp_path / "w.pt")
    report = evaclip.load_checkpoint(target, tmp_path / "w.pt", skip=("visual.head",))
    assert torch.equal(target.visual.head.weight, before)
    assert report.kept == report.unused == ("visual.head.weight", "visual.head.bias")
    assert torch.equal(target.visual.norm.weight, weights["visual.norm.weight"])


@pytest.mark.parametrize("skip", ["visual.head", ("visual.heads",)])
def test_what_is_skipped_must_be_the_models(skip, tmp_path):
    torch.save(state(), tmp_path / "w.pt")
    target = model()
    with pytest.raises(ValueError, match=r"skip names .*, which the model does not have; give a sequence of its keys"):
        evaclip.load_checkpoint(target, tmp_path / "w.pt", skip=skip)
    assert same(target.state_dict(), model().state_dict())


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
    with pytest.raises(ValueError, match="entries that are no tensors by name: 'weights', 'epoch'"):
        evaclip.load_checkpoint(model(), path)
    torch.save({"model": state(), "args": fractions.Fraction(1, 2)}, path)
    with pytest.raises(ValueError, match=r"cannot read .*pickles a fractions.Fraction, and no code of a file is run"):
        evaclip.load_checkpoint(model(), path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"TorchScript archive, as OpenAI's; .*torch.jit.load\(path"):
        evaclip.load_checkpoint(model(), path)


def test_command_line_arguments_beside_the_weights_are_passed_over(tmp_path):
    torch.save({"model": state(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "w.pt")
    target = model()
    evaclip.load_checkpoint(target, tmp_path / "w.pt")
    assert same(target.state_dict(), state())


def test_a_model_without_storage_is_refused(tmp_path):
    torch.save(state(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"a model on the meta device cannot hold .*to_empty"):
        evaclip.create_model(NAME, checkpoint=tmp_path / "w.pt", device="meta")
