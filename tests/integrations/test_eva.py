"""The original EVA-CLIP code's modules, as `eva_like` has them: as exact as they were, same outside, and back again."""

import copy
import os
import pickle
import re
from functools import partial

import pytest
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from integrations import eva_like, twins
from torch import nn

import evakernels as ek
from benchmarks.bench_integrations import Xops
from evakernels.integrations import eva, stand_ins

RMS = partial(eva_like.RMSnorm, eps=1e-6)
# What sets the published families apart, each with stochastic depth.
TOWERS = {
    "EVA01": {"init_values": 0.1},
    "EVA02": {"naiveswiglu": True, "subln": True, "rope": True},
    "EVA02-E": {"postnorm": True},
    "8B": {"norm_layer": RMS, "qkv_bias": False},
    "18B": {"norm_layer": RMS, "qkv_bias": False, "postnorm": True, "init_values": 0.5},
}


def clip(vision="EVA02", text=None, **more):
    """A model; and the environment as the original's create_model leaves it, for the last one made."""
    torch.manual_seed(0)
    os.environ[eva_like.VARIABLE] = str(int("rope" in TOWERS[vision]))
    return twins.scrambled(eva_like.CustomCLIP({**TOWERS[vision], **more}, text))


def pair(model, **options):
    """The model, and its replaced copy."""
    replaced = copy.deepcopy(model)
    eva.replace(replaced, **options)
    return model, replaced


def both(model, images, ids):
    return model.visual(images), model.text(ids)


def inputs(batch=3):
    ids = torch.randint(0, 20, (batch, 7), generator=torch.Generator().manual_seed(3))
    return twins.images(24, batch), ids


def names(report):
    return {name: by for name, by in report.replaced.items() if "blocks.1" not in name}


def equal(these, those):
    return all(torch.equal(x, y) for x, y in zip(these, those, strict=True))


@pytest.fixture(autouse=True)
def environment_restored(monkeypatch):
    monkeypatch.setenv(eva_like.VARIABLE, "")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("family", TOWERS)
def test_outputs_and_gradients_are_as_exact_as_before(family, dtype, training, monkeypatch):
    autocast, fused = dtype == "autocast", dtype != torch.bfloat16
    # But in bfloat16 the original's plain formula has probabilities that no fused attention has: float32 ones under
    # autocast, and in float32 such as are not computed anew from a rounded log-sum-exp. The published runs had
    # xformers' there.
    monkeypatch.setattr(eva_like, "xops", Xops)
    model = clip(family, {"xattn": autocast}, xattn=fused, drop_path_rate=0.5, patch_dropout=0.5).train(training)
    if dtype == torch.bfloat16:
        model = model.to(dtype)
    images, ids = inputs()
    images = images.to(model.visual.head.weight.dtype)
    twins.assert_same(*pair(model), both, images, ids, autocast=autocast)


def test_what_is_replaced_and_what_not_is_reported_by_name():
    report = eva.replace(clip(patch_dropout=0.5))
    assert names(report) == {
        "visual": "patch ids as an argument",
        "visual.patch_embed": "patchify, of kept patches",
        "visual.patch_dropout": "gather_tokens",
        "visual.blocks.0": "add_norm",
        "visual.blocks.0.norm1": "layer_norm",
        "visual.blocks.0.norm2": "layer_norm",
        "visual.blocks.0.attn": "attention_qkvpacked, rotary embedding included",
        "visual.blocks.0.attn.inner_attn_ln": "layer_norm",
        "visual.blocks.0.mlp": "swiglu_norm_packed",
        "visual.blocks.0.mlp.ffn_ln": "layer_norm",
        "visual.norm": "layer_norm",
        "text.transformer.resblocks.0": "add_norm",
        "text.transformer.resblocks.0.ln_1": "layer_norm",
        "text.transformer.resblocks.0.ln_2": "layer_norm",
        "text.transformer.resblocks.0.attn": "attention_qkvpacked, causal",
        "text.ln_final": "layer_norm",
    }
    assert report.left == {}
    report = eva.replace(clip("18B").visual)
    assert names(report) == {
        "": "patch ids as an argument",
        "patch_embed": "patchify, of kept patches",
        "blocks.0": "norm_add, twice",
        "blocks.0.norm1": "rms_norm",
        "blocks.0.norm2": "rms_norm",
        "blocks.0.attn": "attention_qkvpacked",
        "norm": "rms_norm",
    }
    assert report.left == {
        f"blocks.{i}.mlp": "two matrix products and a GELU: there is nothing to fuse" for i in (0, 1)
    }


def test_it_looks_the_same_from_outside_can_be_copied_and_undone():
    model = clip(patch_dropout=0.5)
    before, untouched = twins.state(model), copy.deepcopy(model)
    report = eva.replace(model)
    twins.assert_looks_the_same(untouched, model)
    images, ids = inputs()
    copied = pickle.loads(pickle.dumps(model)).eval()
    assert equal(both(copied, images, ids), both(model.eval(), images, ids))
    model.train()
    report.undo()
    assert twins.state(model) == before


def test_it_compiles_without_a_graph_break():
    model = pair(clip("EVA02", {"layers": 1}, depth=1, patch_dropout=0.5))[1]
    twins.assert_compiles_alike(model, both, *inputs())


def test_recomputed_activations_give_the_same_gradients_as_kept_ones():
    model = pair(clip(drop_path_rate=0.5, patch_dropout=0.5))[1]
    expected = twins.results(model, both, *inputs())
    model.visual.grad_checkpointing = model.text.transformer.grad_checkpointing = True
    found = twins.results(model, both, *inputs())
    assert equal(found[0], expected[0]) and equal(found[1].values(), expected[1].values())


def test_two_forwards_before_a_backward_keep_their_own_patches_whatever_the_environment(monkeypatch):
    tower = pair(clip(patch_dropout=0.5))[1].visual
    monkeypatch.setenv(eva_like.VARIABLE, "0")
    tower.grad_checkpointing = True
    first, second = twins.images(24, seed=1), twins.images(24, seed=2)

    def gradient(*batches):
        tower.zero_grad()
        torch.manual_seed(5)
        sum(tower(images).square().sum() for images in batches).backward()
        return torch.cat([p.grad.flatten() for p in tower.parameters()])

    together, alone = gradient(first, second), gradient(first)
    torch.manual_seed(5)
    tower(first)
    tower.zero_grad()
    tower(second).square().sum().backward()
    rest = torch.cat([p.grad.flatten() for p in tower.parameters()])
    torch.testing.assert_close(together, alone + rest, rtol=1e-4, atol=1e-5)


def test_a_step_of_training_with_rope_and_dropped_patches_lowers_the_loss():
    model = clip(patch_dropout=0.5)
    eva.replace(model)
    loss = eva.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)
    optimizer = ek.FusedLAMB(model.parameters(), lr=2e-2)
    values = []
    for _ in range(6):
        torch.manual_seed(0)
        value, accuracies = loss(*model(*inputs(6)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] and set(accuracies) == {"i2t", "t2i"}


def test_ids_may_be_drawn_by_this_package_and_only_kept_patches_are_embedded():
    drawn = []

    def draw(batch, patches, keep, device):
        drawn.append((batch, patches, keep, device.type))
        return ek.sample_kept_tokens(batch, patches, keep, seed=1, offset=7, device=device)

    model = clip(patch_dropout=0.5)
    untouched = copy.deepcopy(model).visual
    eva.replace(model, draw=draw)
    images = twins.images(24)
    found = model.visual(images)
    kept = ek.sample_kept_tokens(2, 9, 4, seed=1, offset=7).long()

    def dropped(x):
        return torch.cat([x[:, :1], x[torch.arange(2)[:, None], kept + 1]], 1), kept

    untouched.patch_dropout.forward = dropped
    torch.testing.assert_close(found, untouched(images))
    assert drawn == [(2, 9, 4, "cpu")]
    spoiled = images.clone()
    unseen = sorted(set(range(9)) - set(kept[0].tolist()))[0]
    row, column = divmod(unseen, 3)
    spoiled[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = float("nan")
    assert torch.equal(model.visual(spoiled), found)  # a dropped patch is not even read
    with pytest.raises(ValueError, match=r"the images are \(32, 24\); this model takes \(24, 24\)"):
        model.visual(torch.zeros(2, 3, 32, 24))


@pytest.mark.parametrize("family", ["EVA01", "EVA02"])
def test_xattn_without_xformers_needs_no_stand_in_once_replaced(family, monkeypatch):
    model = clip(family, {"xattn": True}, xattn=True)
    untouched, replaced = pair(model)
    with pytest.raises(AttributeError):
        untouched.visual(inputs()[0])
    assert eva_like.xops is None
    found = both(replaced, *inputs())
    monkeypatch.setattr(eva_like, "xops", stand_ins)  # has the two names
    for mine, theirs in zip(found, both(untouched, *inputs()), strict=True):
        torch.testing.assert_close(mine, theirs)
    twins.assert_same(untouched, replaced, both, *inputs())


def test_apexs_norms_give_autocasts_dtype_as_they_did():
    fused = partial(stand_ins.FusedLayerNorm, eps=1e-6)
    model = clip(text={"norm_layer": stand_ins.FusedLayerNorm}, norm_layer=fused)
    report = eva.replace(copy.deepcopy(model))
    assert report.replaced["visual.norm"] == "layer_norm" and not report.left
    with torch.autocast("cpu", torch.bfloat16):
        assert pair(model)[1].visual.norm(torch.ones(2, 64)).dtype == torch.bfloat16
    twins.assert_same(*pair(model.eval()), both, *inputs(), autocast=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_by_itself_gives_the_dtype_it_gave(dtype, weights, autocast):
    for family in ("8B", "EVA01"):
        if family == "EVA01" and dtype != weights:
            continue  # PyTorch's refuses some of these
        untouched, replaced = pair(clip(family).visual)
        x = torch.randn(2, 64).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = (tower.norm.to(weights)(x) for tower in (replaced, untouched))
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


def test_mean_pooling_and_all_features_are_as_before():
    model = clip("EVA02-E", use_mean_pooling=True)
    twins.assert_same(*pair(model), both, *inputs())
    twins.assert_same(*pair(clip()), lambda model, *x: [model.visual(x[0], True), model.text(x[1], True)], *inputs())


def test_layer_scale_of_the_text_tower_is_kept():
    twins.assert_same(*pair(clip(text={"ls_init_value": 0.3})), both, *inputs())


def test_hooks_go_on_to_be_called_with_what_they_saw():
    untouched, replaced = pair(clip())
    seen = []
    for model in (untouched, replaced):
        for name in (
            *("visual.norm", "visual.blocks.0.norm2", "visual.blocks.0.mlp.w1", "visual.blocks.1.mlp.ffn_ln"),
            *("text.transformer.resblocks.0.ln_2", "text.transformer.resblocks.1.attn"),
        ):
            model.get_submodule(name).register_forward_hook(
                lambda _, __, y, name=name: seen.append((name, getattr(y, "shape", None)))
            )
        both(model, *inputs())
    assert len(seen) == 12 and seen[:6] == seen[6:]


def test_a_forward_set_on_the_patch_embedding_is_called_though_patches_are_dropped():
    found = []
    for model in pair(clip(patch_dropout=0.5)):
        proj = model.visual.patch_embed.proj
        proj.forward = lambda x, own=proj.forward: 3 * own(x)
        torch.manual_seed(1)  # the same patches
        found.append(model.visual(inputs()[0]))
    torch.testing.assert_close(*found)


def test_a_mask_or_bias_of_the_caller_is_obeyed():
    untouched, replaced = pair(clip("EVA01").eval())
    x, hidden = torch.randn(2, 10, 64), torch.ones(2, 10)
    hidden[:, 5:] = 0
    options = {"attn_mask": hidden}, {"rel_pos_bias": torch.randn(2, 10, 10)}
    for of in options:
        expected = untouched.visual.blocks[0](x, **of)
        torch.testing.assert_close(replaced.visual.blocks[0](x, **of), expected)
        assert not torch.allclose(expected, untouched.visual.blocks[0](x))
    with pytest.raises(NotImplementedError, match="a mask or bias beside dropped patches is not covered"):
        replaced.visual.blocks[0](x, attn_mask=hidden, kept=torch.arange(9).expand(2, -1))
    block, theirs = replaced.text.transformer.resblocks[0], untouched.text.transformer.resblocks[0]
    mask = torch.randn(7, 7)  # not the tower's own
    x = torch.randn(7, 2, 64)
    torch.testing.assert_close(block(x, attn_mask=mask), theirs(x, attn_mask=mask))
    torch.testing.assert_close(block(x), theirs(x))
    own = untouched.text.attn_mask
    torch.testing.assert_close(block(x, replaced.text.attn_mask.detach()), theirs(x, own))


@pytest.mark.parametrize(
    ("vision", "left"),
    [
        ({"use_rel_pos_bias": True}, {"blocks.0.attn": "relative position bias is not covered"}),
        ({"use_shared_rel_pos_bias": True}, {"rel_pos_bias": "relative position bias is not covered"}),
        ({"num_heads": 4}, {"blocks.0.attn": "its head dimension is 16; attention serves 32 to 128 in steps of 8"}),
    ],
)
def test_what_is_not_covered_stays_and_says_why(vision, left):
    model = clip("EVA01", **vision)
    report = eva.replace(model.visual)
    assert left.items() <= report.left.items()
    assert "blocks.0.attn" not in report.replaced
    report.undo()
    twins.assert_same(*pair(model), both, *inputs())


def changed(model, name, value):
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


@pytest.mark.parametrize(
    ("name", "value", "left", "why"),
    [
        ("blocks.0.attn.attn_drop.p", 0.1, "blocks.0.attn", r"drops attention weights \(attn_drop 0\.1\)"),
        ("blocks.0.mlp.act", nn.GELU(), "blocks.0.mlp", "its gate goes through GELU, not SiLU"),
        ("blocks.0.mlp.ffn_ln", RMS(172), "blocks.0.mlp", "its ffn_ln is a RMSnorm; only LayerNorm is covered"),
        ("rope.freqs_cos", torch.ones(9, 32), "blocks.0.attn", "its angles are not those of Rope2d"),
        ("rope.freqs_cos", torch.ones(3, 3, 32), "blocks.0.attn", "its rope is a VisionRotaryEmbeddingFast; Vision"),
    ],
)
def test_what_was_changed_before_stays_and_says_why(name, value, left, why):
    tower = clip().visual
    changed(tower, name, value)
    report = eva.replace(tower)
    assert left not in report.replaced
    assert re.search(why, report.left[left])


def test_a_tower_that_drops_patches_stays_whole_where_a_block_would_not_take_their_ids():
    tower = clip(patch_dropout=0.5).visual
    tower.blocks[1].attn.attn_drop.p = 0.1
    report = eva.replace(tower)
    assert report.left[""] == (
        "it drops patches, and blocks.1.attn, which cannot be replaced, would not take their ids"
    )
    assert "blocks.0.attn" not in report.replaced
    tower.blocks[1].attn.attn_drop.p = 0.0
    torch.manual_seed(0)
    found = tower(twins.images(24))
    report.undo()
    torch.manual_seed(0)
    torch.testing.assert_close(found, tower(twins.images(24)))


@pytest.mark.parametrize("part", ["visual.blocks.1.attn.attn_drop.p", "text.transformer.resblocks.1.attn.dropout"])
def test_a_dropout_rate_that_is_raised_later_is_obeyed(part):
    untouched, replaced = pair(clip("EVA02"))
    path, _, attribute = part.rpartition(".")
    outputs = []
    for model, training in ((untouched, True), (replaced, True), (untouched, False)):
        setattr(model.train(training).get_submodule(path), attribute, 0.5)
        torch.manual_seed(0)
        outputs.append(torch.cat([features.flatten() for features in both(model, *inputs())]))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[0])


@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.attn"])
def test_a_tower_that_drops_patches_stays_whole_where_somebody_has_set_a_forward(place):
    model = clip("EVA02", patch_dropout=0.5)
    module = model.visual.get_submodule(place)
    module.forward = partial(type(module).forward, module)
    report = eva.replace(model)
    assert report.left["visual"].startswith(f"it drops patches, and {place}")
    assert report.left[f"visual.{place}"] == "somebody else has replaced its forward, on the instance"
    both(model, *inputs())


def test_where_somebody_has_set_forward_features_the_rotation_stays_the_towers():
    """It may exchange `rope.forward`, as the original does, and whoever rotates must go on calling it."""
    untouched = clip("EVA02", patch_dropout=0.5)
    replaced = copy.deepcopy(untouched)
    replaced.visual.forward_features = partial(type(replaced.visual).forward_features, replaced.visual)
    report = eva.replace(replaced)
    assert report.left["visual"] == "somebody else has replaced its forward_features, on the instance"
    assert "visual.blocks.0.attn" in report.left and "visual.patch_dropout" not in report.replaced
    found = []
    for model in (untouched, replaced):
        torch.manual_seed(0)
        found.append(model.visual(inputs()[0]))
    torch.testing.assert_close(*found)


def test_a_text_block_whose_forward_somebody_has_set_is_left_with_its_attention():
    model = clip("EVA02")
    block = model.text.transformer.resblocks[0]
    block.forward = partial(type(block).forward, block)
    report = eva.replace(model)
    name = "text.transformer.resblocks.0"
    assert {name, f"{name}.attn"} <= set(report.left) and f"{name}.attn" not in report.replaced
    assert not hasattr(block, "evakernels_tower")


def test_a_class_of_another_shape_under_a_known_name_is_left():
    tower = clip().visual

    class Block(eva_like.Block):
        def forward(self, x, guidance):
            return x

    tower.blocks[1].__class__ = Block
    report = eva.replace(tower)
    assert report.left["blocks.1"].startswith("its attributes, or the parameters of its methods, are not those of eva_")


def test_a_norm_of_another_class_is_left():
    tower = clip().visual
    tower.norm.__class__ = type("GuidedNorm", (eva_like.LayerNorm,), {})
    assert eva.replace(tower).left == {"norm": "it is a GuidedNorm; only LayerNorm is covered"}


def test_a_text_mask_that_is_not_causal_is_left_to_the_original():
    model = clip()
    model.text.attn_mask[0, 1] = 0.0
    report = eva.replace(copy.deepcopy(model))
    assert report.left["text.transformer.resblocks.0.attn"] == "its mask is not the triangular one"
    twins.assert_same(*pair(model), both, *inputs())


@pytest.mark.parametrize(
    ("side", "reference", "spanned"),
    [(1, 16, True), *((side, *of) for side in (3, 4, 14, 24) for of in ((16, True), (24, True), (None, False)))],
)
@pytest.mark.parametrize("half", [False, True])
def test_the_angles_are_taken_from_the_tables(side, reference, spanned, half):
    made = eva_like.VisionRotaryEmbeddingFast(32, reference or side, side if spanned else None)
    rope = eva._rope(made.half() if half else made)
    assert isinstance(rope, ek.Rope2d) and (rope.grid, rope.reference_grid) == ((side, side), reference or side)


def test_wrong_models_are_refused_with_words():
    with pytest.raises(TypeError, match="nothing in this Linear is known to it; give a CustomCLIP or CLIP of eva_clip"):
        eva.replace(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="nothing in this Block is known to it"):
        eva.replace(timm.models.vision_transformer.Block(64, 2))  # a library's of the same name, norms and all
    with pytest.raises(TypeError, match="nothing in this Sequential is known to it"):
        eva.replace(nn.Sequential(nn.LayerNorm(4), eva_like.LayerNorm(4)))
    model = clip()
    eva.replace(model)
    with pytest.raises(ValueError, match="has been replaced before"):
        eva.replace(model)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_evas(smoothing):
    image, text = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    loss, accuracies = eva.ClipLoss(smoothing=smoothing)(image, text, scale)
    logits, labels = scale * image @ text.T, torch.arange(5)
    expected = sum(F.cross_entropy(x, labels, label_smoothing=smoothing) for x in (logits, logits.T)) / 2
    torch.testing.assert_close(loss, expected)
    leaves = image, text, scale
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    assert accuracies["i2t"] == (logits.argmax(-1) == labels).double().mean()
    assert accuracies["t2i"] == (logits.argmax(0) == labels).double().mean()
    assert torch.equal(eva.ClipLoss()(image, text)[0], eva.ClipLoss()(image, text, 1.0)[0])


def test_the_loss_refuses_with_words():
    with pytest.raises(ValueError, match=r"eva\.ClipLoss: smoothing is 1\.0; allowed is 0 <= smoothing < 1"):
        eva.ClipLoss(smoothing=1.0)
    with pytest.raises(
        ValueError, match=r"eva\.ClipLoss: world_size is 2, but of torch.distributed's default group it"
    ):
        eva.ClipLoss(world_size=2)(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="use_horovod is True"):
        eva.ClipLoss(use_horovod=True)
