"""open_clip's models and losses, replaced: the same to rounding, in every mode, with every module accounted for."""

import copy
import functools
from unittest import mock

import numerics
import open_clip
import pytest
import timm
import torch
from integrations import twins
from open_clip import transformer as theirs
from torch import nn

import evakernels as ek
from evakernels.integrations.open_clip import optimizer, replace

VISION = {"layers": 2, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32, "mlp_ratio": 2.0}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 64, "heads": 2, "layers": 2}


def published(name, heads):
    """A published configuration, with one narrow block in its vision tower and two in its text tower."""
    config = open_clip.get_model_config(name)
    text = config["text_cfg"] | TEXT
    vision = config["vision_cfg"] | {"patch_dropout": 0.5, "image_size": 64}
    narrow = functools.partial(timm.create_model, img_size=64, depth=1, embed_dim=128, num_heads=heads)
    bias = {"init_logit_bias": config.get("init_logit_bias"), "output_dict": True}
    with mock.patch("timm.create_model", narrow):
        return open_clip.CustomTextCLIP(128, vision, text, **bias)


MAKE = {
    "EVA02-B-16": functools.partial(published, "EVA02-B-16", 2),
    "ViT-B-16-SigLIP": functools.partial(published, "ViT-B-16-SigLIP", 2),
    "ViT-B-32": lambda: open_clip.CLIP(
        32, VISION | {"patch_dropout": 0.5}, TEXT, quick_gelu=True, output_dict=True
    ),
    "SigLIP": lambda: open_clip.CustomTextCLIP(
        32,
        VISION | {"pool_type": "avg", "ls_init_value": 0.3, "no_ln_pre": True},
        TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        init_logit_bias=-10.0,
        output_dict=True,
    ),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    return twins.scrambled(MAKE[name]())


def twin(model, **options):
    replaced = copy.deepcopy(model)
    return replaced, replace(replaced, **options)


@pytest.fixture(scope="module", params=MAKE)
def pair(request):
    untouched = make(request.param)
    return untouched, *twin(untouched)


def call(model, x, ids):
    out = model(x, ids)
    return [out[key] for key in sorted(out)]


def inputs(model, batch=3):
    ids = torch.randint(1, 64, (batch, 12), generator=torch.Generator().manual_seed(0))
    return twins.images(model.visual.image_size[0], batch), ids


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_untouched_model(pair, training, autocast):
    untouched, replaced, _ = pair
    untouched.train(training)
    replaced.train(training)
    twins.assert_same(untouched, replaced, call, *inputs(untouched), autocast=autocast)


def test_inference_is_that_of_the_untouched_model(pair):
    """Without gradients, where PyTorch's own module takes its fast path."""
    untouched, replaced, _ = pair
    with torch.inference_mode():
        found, expected = (call(model.eval(), *inputs(model)) for model in (replaced, untouched))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_parameters_buffers_and_classes_look_the_same(pair):
    twins.assert_looks_the_same(*pair[:2])


def of_blocks(prefix, per_block, depth=2):
    return {f"{prefix}.{i}{name}": by for i in range(depth) for name, by in per_block.items()}


def resblocks(prefix, causal):
    attention = "attention_qkvpacked, causal" if causal else "attention_qkvpacked"
    per_block = {"": "add_norm", ".attn": attention, ".ln_1": "layer_norm", ".ln_2": "layer_norm"}
    return of_blocks(f"{prefix}transformer.resblocks", per_block)


NORM = "layer_norm"
EVA_BLOCK = {
    "": "add_norm",
    ".norm1": NORM,
    ".norm2": NORM,
    ".attn": "attention_qkvpacked, rotary embedding included",
    ".attn.norm": NORM,
    ".mlp": "swiglu_norm_packed",
    ".mlp.norm": NORM,
}
VIT_BLOCK = {"": "add_norm", ".norm1": NORM, ".norm2": NORM, ".attn": "attention_qkvpacked"}
GELU = "two matrix products and a GELU: there is nothing to fuse"
LEFT = {
    "ViT-B-16-SigLIP": {
        "visual.trunk.attn_pool": "its queries are not the tokens that it attends to",
        "visual.trunk.attn_pool.mlp": GELU,
        "visual.trunk.blocks.0.mlp": GELU,
    }
}
REPLACED = {
    "EVA02-B-16": of_blocks("visual.trunk.blocks", EVA_BLOCK, 1)
    | {"visual.trunk.rope": "patch ids instead of tables", "visual.trunk.norm": NORM, "text.ln_final": NORM}
    | {"visual.trunk.patch_drop": "gather_tokens"}
    | resblocks("text.", causal=True),
    "ViT-B-16-SigLIP": of_blocks("visual.trunk.blocks", VIT_BLOCK, 1)
    | {"visual.trunk.norm": NORM, "visual.trunk.attn_pool.norm": NORM, "text.ln_final": NORM}
    | {"visual.trunk.patch_drop": "gather_tokens"}
    | resblocks("text.", causal=False),
    "ViT-B-32": resblocks("", causal=True)
    | resblocks("visual.", causal=False)
    | {"visual.ln_pre": NORM, "visual.ln_post": NORM, "ln_final": NORM, "visual.patch_dropout": "gather_tokens"},
    "SigLIP": resblocks("text.", causal=False)
    | resblocks("visual.", causal=False)
    | {"visual.ln_post": NORM, "text.ln_final": NORM},
}


@pytest.mark.parametrize("name", MAKE)
def test_the_report_accounts_for_every_module(name):
    report = twin(make(name))[1]
    assert report.replaced == REPLACED[name] and report.left == LEFT.get(name, {})


def test_undo_restores_everything():
    model = make("ViT-B-32")
    before = twins.state(model)
    replace(model).undo()
    assert twins.state(model) == before


def test_activation_checkpointing_gives_the_same_bits(pair):
    replaced = pair[1].train()
    expected = twins.results(replaced, call, *inputs(replaced))
    replaced.set_grad_checkpointing()
    found = twins.results(replaced, call, *inputs(replaced))
    replaced.set_grad_checkpointing(False)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in expected[1].items())


def test_it_compiles_without_a_graph_break(monkeypatch):
    torch.manual_seed(0)
    replaced = open_clip.CLIP(32, VISION | {"layers": 1}, TEXT | {"layers": 1}, output_dict=True)
    replace(replaced)
    replaced.set_grad_checkpointing()
    # What is computed without being replaced calls it: the triangular mask is recognised in the graph as well.
    monkeypatch.setattr(theirs.ResidualAttentionBlock, "attention", None)
    twins.assert_compiles_alike(replaced, call, *inputs(replaced))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norm", [theirs.LayerNorm, theirs.LayerNormFp32])
def test_norms_keep_the_dtype_of_their_input(norm, autocast):
    untouched = twins.scrambled(norm(48))
    replaced, _ = twin(untouched)
    for dtype in (torch.float32, torch.bfloat16) if norm is theirs.LayerNormFp32 else (torch.float32,):
        x = torch.randn(2, 3, 48).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = replaced(x), untouched(x)
        oracle = nn.functional.layer_norm(x.double(), (48,), untouched.weight.double(), untouched.bias.double())
        assert found.dtype == expected.dtype == dtype
        numerics.assert_as_exact_as(found, expected, oracle, numerics.OUTPUTS)


def test_a_model_in_bfloat16_stays_in_bfloat16():
    untouched = make("SigLIP").bfloat16()
    replaced, _ = twin(untouched)
    x, ids = inputs(untouched)
    twins.assert_same(untouched, replaced, call, x.bfloat16(), ids)


def test_a_mask_that_is_not_the_triangular_one_is_kept():
    untouched = make("ViT-B-32").eval()
    untouched.attn_mask[3, 1] = float("-inf")
    replaced, report = twin(untouched)
    assert set(report.left.values()) == {"its mask is not the triangular one"} and len(report.left) == 2
    twins.assert_same(untouched, replaced, call, *inputs(untouched))


def test_a_mask_given_at_the_call_is_kept():
    untouched = make("ViT-B-32").eval()
    replaced, _ = twin(untouched)
    x = torch.randn(2, 12, 64)
    mask = torch.zeros(12, 12).masked_fill(torch.rand(12, 12) < 0.3, -1e4)
    for given in (mask, untouched.attn_mask.clone()):
        found, expected = (m.transformer.resblocks[0](x, attn_mask=given) for m in (replaced, untouched))
        torch.testing.assert_close(found, expected)
    found, expected = (m.transformer.resblocks[0](x, x + 1, x + 1) for m in (replaced, untouched))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ({"embed_cls": True, "output_tokens": True}, "its mask hides padding as well"),
        ({"heads": 4}, "its head dimension is 16; attention serves 32 to 128 in steps of 8"),
        ({"qk_norm": True}, "the attention of a CustomResidualAttentionBlock is not covered"),
    ],
)
def test_what_cannot_be_served_is_left_with_its_reason(text, why):
    torch.manual_seed(0)
    untouched = twins.scrambled(theirs.TextTransformer(**TEXT | {"output_dim": 32} | text)).eval()
    replaced, report = twin(untouched)
    assert report.left == of_blocks("transformer.resblocks", {".attn": why})
    twins.assert_same(untouched, replaced, lambda m, ids: m(ids), torch.randint(1, 64, (3, 12)))


def test_a_hook_on_what_is_passed_over_is_called():
    untouched = make("ViT-B-32").eval()
    replaced, _ = twin(untouched)
    for model in (untouched, replaced):
        model.visual.transformer.resblocks[0].ln_2.register_forward_hook(lambda *a: 2 * a[-1])
        model.transformer.resblocks[1].attn.register_forward_hook(lambda *a: (2 * a[-1][0], None))
    for x, y in zip(call(replaced, *inputs(replaced)), call(untouched, *inputs(untouched)), strict=True):
        torch.testing.assert_close(x, y)


def test_a_hook_on_a_layer_scale_is_called():
    torch.manual_seed(0)
    untouched = twins.scrambled(theirs.VisionTransformer(32, 8, 64, 2, 2, 4.0, ls_init_value=0.1, output_dim=32)).eval()
    replaced, _ = twin(untouched)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(replaced(x), untouched(x))
    for model in (untouched, replaced):
        for scale in (model.transformer.resblocks[0].ls_1, model.transformer.resblocks[1].ls_2):
            scale.register_forward_hook(lambda *a: 2 * a[-1])
    torch.testing.assert_close(replaced(x), untouched(x))


def patch(module, function):
    module.forward = functools.partial(function, module)


def test_a_forward_set_on_the_instance_is_called():
    """By whoever wants to see the weights of an attention, before or after the replacement."""
    untouched = make("ViT-B-32").eval()
    replaced = copy.deepcopy(untouched)
    for model in (untouched, replaced):
        patch(model.transformer.resblocks[0], theirs.ResidualAttentionBlock.forward)
    report = replace(replaced)
    block = {name: why for name, why in report.left.items() if name.startswith("transformer.resblocks.0")}
    assert block == {
        "transformer.resblocks.0": "somebody else has replaced its forward, on the instance",
        "transformer.resblocks.0.attn": "its block is left",
    }
    assert not block.keys() & report.replaced.keys()
    for model in (untouched, replaced):
        attn = model.visual.transformer.resblocks[1].attn
        patch(attn, lambda self, *inputs, **options: (2 * nn.MultiheadAttention.forward(self, *inputs, **options)[0],))
    for x, y in zip(call(replaced, *inputs(replaced)), call(untouched, *inputs(untouched)), strict=True):
        torch.testing.assert_close(x, y)
    report.undo()


def test_a_dropout_rate_that_is_raised_later_is_obeyed():
    untouched = make("SigLIP")
    replaced, _ = twin(untouched)
    outputs = []
    for model, training in ((untouched, True), (replaced, True), (untouched, False)):
        model.train(training).visual.transformer.resblocks[1].attn.dropout = 0.5
        torch.manual_seed(0)
        outputs.append(model.encode_image(inputs(model)[0]))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[0])


def test_a_block_of_another_class_is_named():
    model = make("ViT-B-32")
    model.transformer.resblocks[1].__class__ = type("MyBlock", (theirs.ResidualAttentionBlock,), {})
    assert replace(model).left == {"transformer.resblocks.1": "a MyBlock is not covered"}


def test_other_towers_are_named():
    vision = {"timm_model_name": "test_convnext", "timm_pool": "avg", "timm_proj": "linear"}
    model = open_clip.CustomTextCLIP(32, {"image_size": 64} | vision, TEXT)
    assert replace(model).left == {"visual.trunk": "timm's ConvNeXt is not covered"}


# Losses


def features(dtype=torch.float32, rounded=torch.float32, batch=6):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, batch, 16, generator=generator, dtype=torch.float64)
    return [nn.functional.normalize(x, dim=-1).to(rounded).to(dtype).requires_grad_() for x in (image, image + text)]


LOSSES = {"ClipLoss": open_clip.ClipLoss, "SigLipLoss": open_clip.loss.SigLipLoss}


def loss_and_gradients(loss, dtype, rounded, scalars=torch.float32):
    leaves = [*features(dtype, rounded), *(torch.tensor(x, dtype=scalars, requires_grad=True) for x in (20.0, -10.0))]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_untouched_one_and_more_exact(name, dtype):
    untouched = LOSSES[name]()
    replaced, report = twin(untouched)
    assert list(report.replaced) == [""]
    expected, found = (loss_and_gradients(loss, dtype, dtype) for loss in (untouched, replaced))
    oracle = loss_and_gradients(untouched, torch.float64, dtype, torch.float64)
    assert found[0].dtype == expected[0].dtype and [g.dtype for g in found[1]] == [g.dtype for g in expected[1]]
    for triple in zip((found[0], *found[1]), (expected[0], *expected[1]), (oracle[0], *oracle[1]), strict=True):
        numerics.assert_as_exact_as(*triple, numerics.GRADIENTS)
    assert list(replaced(*features(), 20.0, -10.0, output_dict=True)) == ["contrastive_loss"]


def test_a_loss_can_be_undone():
    loss = open_clip.ClipLoss()
    report = replace(loss)
    report.undo()
    assert type(loss) is open_clip.ClipLoss


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (open_clip.ClipLoss(local_loss=True, world_size=2), "local_loss without gather_with_grad"),
        (open_clip.ClipLoss(use_horovod=True, world_size=2), "its processes meet by Horovod"),
        (open_clip.DistillClipLoss(), "a DistillClipLoss needs more than the contrastive loss of two features"),
        (open_clip.CoCaLoss(1.0, 1.0), "a CoCaLoss needs more than the contrastive loss of two features"),
    ],
)
def test_a_loss_that_cannot_be_served_says_why(loss, why):
    with pytest.raises(ValueError, match=why):
        replace(loss)


def test_a_loss_without_its_process_group_says_so():
    loss = open_clip.ClipLoss(world_size=2)
    replace(loss)
    with pytest.raises(ValueError, match=r"open_clip\.ClipLoss: world_size is 2, but.*it is not initialised"):
        loss(*features(), 20.0)


# The optimizer


def test_the_optimizer_has_the_groups_of_open_clips_training_loop():
    model = make("SigLIP")
    model.visual.conv1.weight.requires_grad_(False)
    made = optimizer(model, 1e-3, weight_decay=0.3, max_grad_norm=1.0)
    assert isinstance(made, ek.FusedLAMB) and made.max_grad_norm == 1.0
    without, decayed = made.param_groups
    assert (without["weight_decay"], decayed["weight_decay"], decayed["lr"]) == (0.0, 0.3, 1e-3)
    names = {id(p): n for n, p in model.named_parameters() if n != "visual.conv1.weight"}
    found = {names[id(p)] for p in without["params"]}
    assert found | {names[id(p)] for p in decayed["params"]} == set(names.values())
    assert {"logit_scale", "logit_bias", "text.ln_final.weight", "visual.class_embedding"} <= found
    assert not found & {"visual.proj", "visual.positional_embedding", "text.token_embedding.weight"}


@pytest.mark.parametrize("name", ["logit_scales", "bn_table", "ln_table", "biases"])
def test_a_matrix_is_told_by_its_name_as_well(name):
    model = nn.ParameterDict({"matrix": torch.zeros(2, 2), name: torch.zeros(2, 2)})
    without, decayed = optimizer(model, 1e-3).param_groups
    assert without["params"][0] is model[name] and decayed["params"][0] is model["matrix"]


def test_wrong_uses_are_explained():
    with pytest.raises(TypeError, match=r"nothing in this Linear is known to it; give a model of open_clip"):
        replace(nn.Linear(2, 2))
    model = make("ViT-B-32")
    replace(model)
    with pytest.raises(ValueError, match=r"has been replaced before; call undo\(\)"):
        replace(model)
    with torch.device("meta"), pytest.raises(ValueError, match="is on the meta device"):
        replace(open_clip.CLIP(32, VISION, TEXT))
