"""timm's models, replaced: the same to rounding, in every mode, with every module accounted for."""

import copy
import functools
import io

import pytest
import timm
import torch
from integrations import twins
from timm.models.eva import Eva
from torch import nn

import evakernels as ek
from evakernels.integrations.timm import replace

# Published models, narrower, of two blocks and on small images: head dimensions, odd widths and layouts are theirs.
MODELS = {
    "EVA02-B": ("eva02_base_patch16_clip_224", {"img_size": 64, "embed_dim": 128, "num_heads": 2}),
    "EVA02-L": ("eva02_large_patch14_clip_224", {"img_size": 56, "embed_dim": 128, "num_heads": 2}),
    "EVA02-L-336": ("eva02_large_patch14_clip_336", {"img_size": 84, "embed_dim": 64, "num_heads": 1}),
    "EVA01-g": ("eva_giant_patch14_clip_224", {"img_size": 56, "embed_dim": 176, "num_heads": 2, "mlp_ratio": 2}),
    "EVA02-E": ("eva02_enormous_patch14_clip_224", {"img_size": 56, "embed_dim": 224, "num_heads": 2, "mlp_ratio": 2}),
    "SigLIP": ("vit_base_patch16_siglip_224", {"img_size": 64, "embed_dim": 64, "num_heads": 2, "init_values": 0.3}),
}
# What no EVA-CLIP model has, but Eva can: packed SwiGLU, layer scale, registers, halves of a head turned.
OTHER = {
    "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 8, "swiglu_mlp": True,
    "attn_type": "rope", "init_values": 0.3, "num_reg_tokens": 2, "no_embed_class": True, "use_rot_pos_emb": True,
    "rope_rotate_half": True, "ref_feat_shape": (8, 8),
}  # fmt: skip
DROPS = {"patch_drop_rate": 0.5, "drop_path_rate": 0.5}


def make(name, **options):
    torch.manual_seed(0)
    if name == "other":
        return twins.scrambled(Eva(**OTHER, **options))
    entry, sizes = MODELS[name]
    return twins.scrambled(timm.create_model(entry, **{"depth": 2, "num_classes": 8} | sizes | options))


def twin(model, **options):
    replaced = copy.deepcopy(model)
    return replaced, replace(replaced, **options)


def size(model):
    return model.patch_embed.img_size[0]


@pytest.fixture(scope="module", params=[*MODELS, "other"])
def pair(request):
    untouched = make(request.param)
    return untouched, *twin(untouched)


@pytest.fixture(scope="module", params=["EVA02-B", "EVA02-E", "SigLIP", "other"])
def dropping(request):
    untouched = make(request.param, **DROPS)
    return untouched, twin(untouched)[0]


def call(model, x):
    features = model.forward_features(x)
    return features, model.forward_head(features)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_untouched_model(pair, training, autocast):
    untouched, replaced, _ = pair
    untouched.train(training)
    replaced.train(training)
    twins.assert_same(untouched, replaced, call, twins.images(size(untouched)), autocast=autocast)


def test_norms_that_feed_products_alone_have_their_dtype_under_autocast():
    replaced, _ = twin(make("EVA02-B"))
    x = torch.randn(2, 3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        block = replaced.blocks[0]
        assert {norm(x).dtype for norm in (block.norm1, block.norm2, block.attn.norm)} == {torch.bfloat16}
        assert replaced.norm(x).dtype == torch.float32


def test_parameters_buffers_and_classes_look_the_same(pair):
    twins.assert_looks_the_same(*pair[:2])


@pytest.mark.parametrize("autocast", [False, True])
def test_dropped_patches_and_paths_are_those_of_the_untouched_model(dropping, autocast):
    untouched, replaced = dropping
    twins.assert_same(untouched, replaced, call, twins.images(size(untouched), batch=5), autocast=autocast)


def test_activation_checkpointing_gives_the_same_bits(dropping):
    _, replaced = dropping
    x = twins.images(size(replaced))
    expected = twins.results(replaced, call, x)
    replaced.set_grad_checkpointing()
    found = twins.results(replaced, call, x)
    replaced.set_grad_checkpointing(False)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in expected[1].items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_compiles_without_a_graph_break(checkpointing):
    replaced = twin(make("EVA02-B", patch_drop_rate=0.5, depth=1))[0]
    replaced.set_grad_checkpointing(checkpointing)
    twins.assert_compiles_alike(replaced, call, twins.images(size(replaced)))


def test_a_model_in_bfloat16_stays_in_bfloat16():
    untouched = make("EVA02-L").bfloat16()
    replaced, report = twin(untouched)
    assert not report.left
    twins.assert_same(untouched, replaced, call, twins.images(size(untouched)).bfloat16())


def of_blocks(per_block, depth=2):
    return {f"blocks.{i}{name}": by for i in range(depth) for name, by in per_block.items()}


NORMS = {".norm1": "layer_norm", ".norm2": "layer_norm"}
TURNED, PLAIN = "attention_qkvpacked, rotary embedding included", "attention_qkvpacked"
EVA02 = {"": "add_norm", ".attn": TURNED, ".attn.norm": "layer_norm", ".mlp": "swiglu_norm_packed"}
REPLACED = {
    **dict.fromkeys(
        ("EVA02-B", "EVA02-L", "EVA02-L-336"),
        {"rope": "patch ids instead of tables", "norm": "layer_norm"}
        | of_blocks(EVA02 | NORMS | {".mlp.norm": "layer_norm"}),
    ),
    "EVA01-g": {"norm": "layer_norm"} | of_blocks({"": "add_norm", ".attn": PLAIN} | NORMS),
    "EVA02-E": {"norm": "layer_norm"} | of_blocks({"": "norm_add, twice", ".attn": PLAIN} | NORMS),
    "SigLIP": {"norm": "layer_norm", "attn_pool.norm": "layer_norm"}
    | of_blocks({"": "add_norm", ".attn": PLAIN} | NORMS),
    "other": {"rope": "patch ids instead of tables", "fc_norm": "layer_norm"}
    | of_blocks({"": "add_norm", ".attn": TURNED, ".mlp": "swiglu"} | NORMS),
}
GELU = "two matrix products and a GELU: there is nothing to fuse"
LEFT = {
    **dict.fromkeys(("EVA01-g", "EVA02-E"), of_blocks({".mlp": GELU})),
    "SigLIP": of_blocks({".mlp": GELU})
    | {"attn_pool": "its queries are not the tokens that it attends to", "attn_pool.mlp": GELU},
}


@pytest.mark.parametrize("name", [*MODELS, "other"])
def test_the_report_accounts_for_every_module(name):
    report = twin(make(name))[1]
    assert report.replaced == REPLACED[name]
    assert report.left == LEFT.get(name, {})


def test_dropping_patches_is_reported():
    report = twin(make("EVA01-g", patch_drop_rate=0.5))[1]
    assert report.replaced == REPLACED["EVA01-g"] | {"patch_drop": "gather_tokens"}


def test_undo_restores_everything():
    model = make("EVA02-B", **DROPS)
    before, expected = twins.state(model), twins.results(model, call, twins.images(64))
    report = replace(model)
    report.undo()
    assert twins.state(model) == before
    found = twins.results(model, call, twins.images(64))
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
    replace(model)  # and it can be done again


def test_copies_and_pickles_compute_the_same():
    replaced, _ = twin(make("EVA02-B"))
    x = twins.images(64)
    torch.save(replaced, buffer := io.BytesIO())
    buffer.seek(0)
    for other in (copy.deepcopy(replaced), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), replaced(x))
        assert other.blocks[0].attn.evakernels_rope is other.blocks[1].attn.evakernels_rope


def test_the_ids_may_be_drawn_by_sample_kept_tokens():
    untouched = make("EVA02-B", patch_drop_rate=0.5)
    drawn = []

    def draw(batch, patches, keep, device):
        drawn.append(ek.sample_kept_tokens(batch, patches, keep, seed=3, offset=10, device=device))
        return drawn[-1]

    replaced, _ = twin(untouched, draw=draw)
    x = twins.images(64)
    y, ids = replaced.patch_drop(tokens := torch.randn(2, 17, 4))
    assert torch.equal(y, ek.gather_tokens(tokens, ids)) and torch.equal(ids, drawn[0])

    class Given(type(untouched.patch_drop)):
        def forward(self, x):
            return ek.gather_tokens(x, ids), ids

    untouched.patch_drop.__class__ = Given
    twins.assert_same(untouched, replaced, call, x)


def test_the_emptied_table_still_serves_whoever_passes_it_on():
    """Blocks called one by one, a mask, a foreign table of angles: each computes as before."""
    untouched = make("EVA02-B").eval()
    replaced, _ = twin(untouched)
    x = torch.randn(2, 17, 128)
    mask = torch.zeros(17, 17).masked_fill(torch.rand(17, 17) < 0.3, -1e4)
    for options in ({}, {"attn_mask": mask}, {"is_causal": True}):
        with torch.no_grad():
            found = replaced.blocks[0](x, rope=replaced.rope.get_embed(), **options)
            expected = untouched.blocks[0](x, rope=untouched.rope.get_embed(), **options)
        torch.testing.assert_close(found, expected)
    foreign = torch.randn_like(untouched.rope.get_embed())
    torch.testing.assert_close(replaced.blocks[0](x, rope=foreign), untouched.blocks[0](x, rope=foreign))
    torch.testing.assert_close(replaced.blocks[0](x), untouched.blocks[0](x))
    y = untouched.rope.get_embed()
    kept = torch.tensor([[3, 1], [0, 15]])
    gathered, ids = (
        timm.layers.apply_keep_indices_nlc(x, model.rope.get_embed(), kept)[:, None] for model in (untouched, replaced)
    )
    assert ids.shape == (2, 1, 2, 1) and gathered.shape == (2, 1, 2, y.shape[1])
    mask = mask[:3, :3]
    found, expected = (
        model.blocks[0](x[:, :3], rope=rope, attn_mask=mask) for model, rope in ((replaced, ids), (untouched, gathered))
    )
    torch.testing.assert_close(found, expected)


def test_a_model_made_with_our_norms_is_covered():
    torch.manual_seed(0)
    untouched = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, norm_layer=ek.nn.LayerNorm)
    replaced, report = twin(twins.scrambled(untouched))
    assert report.replaced["blocks.0"] == "add_norm" and set(report.left) == {"blocks.0.mlp"}
    twins.assert_same(untouched, replaced, lambda m, x: m(x), twins.images(32))


@pytest.mark.parametrize("part", ["ls1", "ls2", "drop_path1", "drop_path2"])
def test_layer_scales_and_drop_paths_that_are_hooked_or_exchanged_are_called(part):
    torch.manual_seed(0)
    untouched = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, init_values=0.1, drop_path_rate=0.1)
    untouched = twins.scrambled(untouched).eval()
    replaced, _ = twin(untouched)
    x = twins.images(32)
    for model in (untouched, replaced):
        model.blocks[0].get_submodule(part).register_forward_hook(lambda *a: 2 * a[-1])
        doubling = nn.Linear(192, 192, bias=False)
        doubling.weight = nn.Parameter(2 * torch.eye(192))
        setattr(model.blocks[1], part, doubling)
    torch.testing.assert_close(replaced(x), untouched(x))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("EVA02-B", part) for part in ("attn.q_proj", "norm2", "mlp.fc1_g", "mlp.norm")),
        *(("EVA01-g", "attn.qkv"), ("EVA02-E", "norm1"), ("SigLIP", "attn.qkv"), ("SigLIP", "norm2")),
    ],
)
def test_what_is_hooked_or_exchanged_later_is_called(name, part):
    """An adapter in the place of a layer, or a hook on it, is not passed over."""
    untouched = make(name).eval()
    replaced, _ = twin(untouched)
    x = twins.images(size(untouched))

    def doubled(module, inputs, output):
        return 2 * output

    for model in (untouched, replaced):
        model.blocks[0].get_submodule(part).register_forward_hook(doubled)
    torch.testing.assert_close(replaced(x), untouched(x))

    class Adapted(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    if "norm" not in part:
        for model in (untouched, replaced):
            parent, _, leaf = part.rpartition(".")
            parent = model.blocks[1].get_submodule(parent)
            adapted = Adapted(parent.get_submodule(leaf).in_features, parent.get_submodule(leaf).out_features)
            adapted.load_state_dict(parent.get_submodule(leaf).state_dict(), strict=False)
            setattr(parent, leaf, adapted)
        if name != "EVA01-g":  # of which timm itself reads the weight alone
            assert torch.allclose(replaced(x), untouched(x))


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2, "num_classes": 4}
ROPE = TINY | {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
HEADS = "its head dimension is 24; attention serves 32 to 128 in steps of 8"
RMS = "it is a RmsNorm; only LayerNorm is covered"
FP32 = "it is a LayerNormFp32; only LayerNorm is covered"
ANGLES = "its angles are not those of Rope2d (offset, order of the axes, or layout)"
MIXED = "it is a RotaryEmbeddingMixed; only RotaryEmbeddingCat is covered"
CASES = {
    "head dimension": (
        TINY | {"embed_dim": 48}, {"blocks.0.attn": HEADS}
    ),
    "qk norm": (TINY | {"qk_norm": True}, {"blocks.0.attn": "its queries and keys are normalised"}),
    "dropout": (TINY | {"attn_drop_rate": 0.1}, {"blocks.0.attn": "it drops attention weights (attn_drop 0.1)"}),
    "hidden dropout": (
        TINY | {"swiglu_mlp": True, "scale_mlp": True, "proj_drop_rate": 0.1},
        {"blocks.0.mlp": "it drops hidden units (rate 0.1)"},
    ),
    "grouped queries": (
        TINY | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
        {"blocks.0.attn": "2 heads of queries share one of keys and values"},
    ),
    "RMSNorm": (
        TINY | {"norm_layer": timm.layers.RmsNorm},
        {
            "blocks.0": f"of its norm: {RMS}",
            **dict.fromkeys(("blocks.0.norm1", "blocks.0.norm2", "fc_norm"), RMS),
        },
    ),
    "norms in float32": (
        TINY | {"norm_layer": timm.layers.LayerNormFp32},
        {"blocks.0": f"of its norm: {FP32}", **dict.fromkeys(("blocks.0.norm1", "blocks.0.norm2", "fc_norm"), FP32)},
    ),
    "offset": (
        ROPE | {"rope_grid_offset": 0.5},
        {"rope": ANGLES},
    ),
    "order of the axes": (
        ROPE | {"rope_grid_indexing": "xy"},
        {"rope": ANGLES},
    ),
    "mixed": (ROPE | {"rope_type": "mixed"}, {"rope": MIXED}),
    "dynamic": (
        ROPE | {"dynamic_img_size": True}, {"rope": "its grid changes with the image (dynamic_img_size)"}
    ),
    "tables for another": (
        ROPE | {"attn_drop_rate": 0.1}, {"rope": "blocks.0.attn, which is not replaced, needs its tables"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_served_is_left_with_its_reason(case):
    options, left = CASES[case]
    torch.manual_seed(0)
    untouched = twins.scrambled(Eva(**options))
    replaced, report = twin(untouched)
    found = {name: why for name, why in report.left.items() if why != GELU}
    if "rope" in left:
        attention = found.pop("blocks.0.attn")
        assert attention == f"its angles cannot be taken over: {left['rope']}" or case == "tables for another"
    assert found == left
    untouched.eval()
    replaced.eval()
    twins.assert_same(untouched, replaced, call, twins.images(32))


class Seen(timm.models.eva.EvaAttention):
    """An attention of a user's own, such as one that keeps its weights to show them."""


@pytest.mark.parametrize("place", ["blocks.1", "blocks.1.attn"])
@pytest.mark.parametrize("patched", [False, True])
def test_the_tables_stay_for_whoever_is_left_in_need_of_them(place, patched):
    torch.manual_seed(0)
    untouched = twins.scrambled(Eva(**ROPE | {"depth": 2})).eval()
    module = untouched.get_submodule(place)
    if patched:
        module.forward = functools.partial(type(module).forward, module)
    else:
        module.__class__ = Seen if place.endswith("attn") else type("Seen", (type(module),), {})
    report = replace(replaced := copy.deepcopy(untouched))
    needs = f"{place}, which is not replaced, needs its tables"
    assert report.left["rope"] == needs and report.left["blocks.0.attn"] == f"its angles cannot be taken over: {needs}"
    why = "somebody else has replaced its forward, on the instance" if patched else "a Seen is not covered"
    assert report.left[place] == why
    torch.testing.assert_close(replaced(x := twins.images(32)), untouched(x))


@pytest.mark.parametrize("part", ["attn.attn_drop", "mlp.drop1"])
@pytest.mark.parametrize("name", ["EVA02-B", "other"])
def test_a_dropout_rate_that_is_raised_later_is_obeyed(name, part):
    untouched = make(name)
    replaced, _ = twin(untouched)
    outputs = []
    for model, training in ((untouched, True), (replaced, True), (untouched, False)):
        model.train(training).blocks[1].get_submodule(part).p = 0.5
        torch.manual_seed(0)
        outputs.append(model.forward_features(twins.images(size(model))))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[0])


def test_towers_that_share_modules_are_replaced_and_undone():
    first, second = (Eva(**ROPE).eval() for _ in range(2))
    second.blocks[0], second.rope = first.blocks[0], first.rope
    both = nn.ModuleList((first, second))
    x, before = twins.images(32), twins.state(both)
    expected = [tower(x) for tower in both]
    report = replace(both)
    assert report.replaced["0.blocks.0.attn"] == report.replaced["1.blocks.0.attn"] == TURNED
    for tower, y in zip(both, expected, strict=True):
        torch.testing.assert_close(tower(x), y)
    report.undo()
    assert twins.state(both) == before


def test_blocks_and_attentions_of_other_classes_are_named():
    options = {key: value for key, value in TINY.items() if key != "depth"} | {"depth": 2}
    model = timm.models.VisionTransformer(**options, attn_layer=timm.layers.DiffAttention)
    model.blocks[1] = timm.models.vision_transformer.ResPostBlock(64, 2)
    report = twin(model)[1]
    assert report.left["blocks.0.attn"] == "a DiffAttention is not covered"
    assert report.left["blocks.1"] == "a ResPostBlock is not covered"
    assert report.replaced["blocks.0"] == "add_norm"


def test_a_mask_given_to_a_vision_transformer_is_obeyed():
    untouched = make("SigLIP").eval()
    replaced, _ = twin(untouched)
    x, mask = torch.randn(2, 5, 64), torch.zeros(5, 5).masked_fill(torch.rand(5, 5) < 0.3, -1e4)
    for options in ((mask,), (None, True), (mask, False)):
        torch.testing.assert_close(replaced.blocks[0](x, *options), untouched.blocks[0](x, *options))
        torch.testing.assert_close(replaced.blocks[0].attn(x, *options), untouched.blocks[0].attn(x, *options))


def test_a_new_input_size_is_refused_rather_than_turned_by_the_old_angles():
    replaced, report = twin(make("EVA02-B"))
    replaced.set_input_size((32, 128))
    with pytest.raises(RuntimeError, match=r"grid was 4 x 4 at replace\(\) and is 2 x 8 now; call undo\(\) before"):
        replaced(torch.randn(1, 3, 32, 128))
    report.undo()
    assert replaced(torch.randn(1, 3, 32, 128)).shape == (1, 8)


def test_wrong_uses_are_explained():
    with pytest.raises(TypeError, match=r"nothing in this Linear is known to it; give an Eva or VisionTransformer"):
        replace(nn.Linear(2, 2))
    replaced, _ = twin(make("EVA01-g"))
    with pytest.raises(ValueError, match=r"has been replaced before; call undo\(\)"):
        replace(replaced)
    with torch.device("meta"), pytest.raises(ValueError, match="is on the meta device"):
        replace(Eva(**TINY))


def test_triton_serves_a_replaced_model(triton_kernels):
    untouched = make("EVA02-B", patch_drop_rate=0.75, depth=1)
    replaced, _ = twin(untouched)
    untouched, replaced = (model.to(triton_kernels) for model in (untouched, replaced))
    twins.assert_same(untouched, replaced, call, twins.images(64, batch=1).to(triton_kernels))
