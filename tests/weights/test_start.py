"""Starting from weights of other models: one tower, another grid, another patch size."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from evaclip.models import create_model, load_checkpoint
from evaclip.train.model import start
from evaclip.train.recipe import Model


def model_of(seed=0, **vision):
    torch.manual_seed(seed)
    return create_model("EVA02-CLIP-tiny", vision=vision)


def start_from(model, path, tower=None):
    """As a recipe that names the file starts."""
    field = {None: "checkpoint", "visual": "image_checkpoint", "text": "text_checkpoint"}[tower]
    return start(model, Model(**{field: str(path)}))


def written(path, state):
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_a_whole_model_moves_to_a_finer_grid(tmp_path):
    source, target = model_of(0), model_of(1, image_size=48)
    before = state(source)
    notes = start_from(target, written(tmp_path / "clip.safetensors", before))
    after = state(target)
    assert all(torch.equal(after[key], before[key]) for key in before if key != "visual.pos_embed")
    grid = before["visual.pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    finer = F.interpolate(grid, (6, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(after["visual.pos_embed"][:, 1:], finer)
    assert torch.equal(after["visual.pos_embed"][:, :1], before["visual.pos_embed"][:, :1])
    assert notes[0].endswith("parameters; interpolated: visual.pos_embed (1, 17, 64) to (1, 37, 64)")


def test_an_inner_norm_that_a_masked_image_model_lacks_may_be_kept(tmp_path):
    source, target = model_of(0), model_of(1)
    images = {k.removeprefix("visual."): v for k, v in state(source).items() if k.startswith("visual.")}
    images = {k: v for k, v in images.items() if "inner_attn_ln" not in k and not k.startswith("head.")}
    path = written(tmp_path / "mim.safetensors", images | {"mask_token": torch.zeros(1, 1, 64)})
    norms = [block.attn.inner_attn_ln.weight for block in target.visual.blocks]
    with torch.no_grad():
        for norm in norms:
            norm.fill_(3)
    report = load_checkpoint(target, path, part="visual", skip=("visual.blocks.0.attn.inner_attn_ln",))
    assert norms[0].eq(3).all() and norms[1].eq(1).all()
    assert "visual.blocks.0.attn.inner_attn_ln.weight" in report.kept
    assert "visual.blocks.0.attn.inner_attn_ln.weight" not in report.initialised


def test_an_image_tower_starts_from_a_masked_image_model(tmp_path):
    """As published: no prefix, no inner norms, a language-model head, a mask token, rotary tables."""
    source, target = model_of(0), model_of(1, image_size=64, patch=16)
    images = {k.removeprefix("visual."): v for k, v in state(source).items() if k.startswith("visual.")}
    images = {k: v for k, v in images.items() if "inner_attn_ln" not in k and not k.startswith("head.")}
    strangers = {
        "mask_token": torch.zeros(1, 1, 64),
        "lm_head.weight": torch.zeros(9, 64),
        "rope.freqs_cos": torch.ones(4),
    }
    before = state(target)
    notes = start_from(target, written(tmp_path / "mim.safetensors", images | strangers), "visual")
    after = state(target)
    for key in after:
        own = key.removeprefix("visual.")
        kept = key.startswith(("text.", "visual.head")) or key == "logit_scale" or "inner_attn_ln" in key
        if kept:
            assert torch.equal(after[key], before[key]), key
        elif own == "patch_embed.proj.weight":
            assert torch.equal(after[key], F.interpolate(images[own], (16, 16), mode="bicubic"))
        else:
            assert torch.equal(after[key], images[own]), key
    (note,) = notes
    assert ": mim, " in note and "1 rotary tables ignored" in note
    assert "not used: lm_head.weight, mask_token" in note
    assert "kept as it was: visual.head.weight, visual.head.bias" in note
    assert "initialised: visual.blocks.0.attn.inner_attn_ln.weight" in note
    assert "visual.patch_embed.proj.weight (64, 3, 8, 8) to (64, 3, 16, 16)" in note


@pytest.mark.parametrize("prefix", ["text.", ""])
def test_a_text_tower_starts_from_a_clip_with_or_without_a_prefix(prefix, tmp_path):
    source, target = model_of(0), model_of(1)
    weights = {k.replace("text.", prefix, 1) if k.startswith("text.") else k: v for k, v in state(source).items()}
    before = state(target)
    start_from(target, written(tmp_path / "clip.safetensors", weights), "text")
    after = state(target)
    for key in after:
        taken = key.startswith("text.") and key != "text.text_projection"
        assert torch.equal(after[key], (state(source) if taken else before)[key]), key


@pytest.mark.parametrize("tower", [None, "visual", "text"])
def test_what_does_not_fit_changes_nothing(tower, tmp_path):
    source, target = model_of(0), model_of(1)
    for change in ("missing", "reshaped", "unexpected"):
        weights = state(source)
        for of in ("visual.blocks.0.norm1", "text.transformer.resblocks.0.ln_1"):
            if change == "missing":
                del weights[of + ".weight"]
            else:
                weights[of + (".weight" if change == "reshaped" else ".more")] = torch.ones(3)
        before = state(target)
        with pytest.raises(ValueError, match=change):
            start_from(target, written(tmp_path / "clip.safetensors", weights), tower)
        assert all(torch.equal(before[key], value) for key, value in state(target).items())


def test_positions_of_another_width_are_refused(tmp_path):
    weights = state(model_of(0))
    weights["visual.pos_embed"] = torch.zeros(1, 26, 32)
    with pytest.raises(ValueError, match=r"reshaped: visual.pos_embed"):
        start_from(model_of(1), written(tmp_path / "clip.safetensors", weights))
