"""Models by name: sizes, state-dict keys, overrides, initial values."""

import math

import pytest
import torch

import evaclip
from evaclip.models.config import CONFIGS

# total, vision, text; as counted in the published code
PARAMETERS = {
    "EVA01-CLIP-B-16": (149_629_697, 86_201_600, 63_428_096),
    "EVA01-CLIP-g-14": (1_136_435_841, 1_012_588_928, 123_846_912),
    "EVA01-CLIP-g-14-plus": (1_366_621_569, 1_012_588_928, 354_032_640),
    "EVA02-CLIP-B-16": (149_691_137, 86_263_040, 63_428_096),
    "EVA02-CLIP-L-14": (427_755_457, 304_105_152, 123_650_304),
    "EVA02-CLIP-L-14-336": (428_083_137, 304_432_832, 123_650_304),
    "EVA02-CLIP-bigE-14": (4_704_589_569, 4_350_556_928, 354_032_640),
    "EVA02-CLIP-bigE-14-plus": (5_044_889_089, 4_350_556_928, 694_332_160),
    "EVA-CLIP-8B": (8_220_748_545, 7_526_088_704, 694_659_840),
    "EVA-CLIP-8B-plus": (8_223_894_273, 7_529_234_432, 694_659_840),
    "EVA-CLIP-8B-448": (8_223_894_273, 7_529_234_432, 694_659_840),
    "EVA-CLIP-18B": (18_325_482_241, 17_630_494_720, 694_987_520),
    "EVA-CLIP-18B-336": (18_327_120_641, 17_632_133_120, 694_987_520),
}
TINY = [name for name in evaclip.list_models() if "tiny" in name]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    model = evaclip.create_model(name, device="meta")
    assert (count(model), count(model.visual), count(model.text)) == PARAMETERS[name]


def test_every_model_is_listed_and_counted_or_tiny():
    assert sorted(evaclip.list_models()) == sorted([*PARAMETERS, *TINY])
    assert all(count(evaclip.create_model(name, device="meta")) < 500_000 for name in TINY)


VISION_KEYS = "cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias norm.weight head.weight"
BLOCK_KEYS = "norm1.weight norm2.weight attn.proj.weight attn.proj.bias"
LAYER_NORM_KEYS = "norm1.bias norm2.bias"
GELU_KEYS = "mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
FUSED_KEYS = "attn.qkv.weight"
BIAS_KEYS = "attn.q_bias attn.v_bias"
SPLIT_KEYS = "attn.q_proj.weight attn.k_proj.weight attn.v_proj.weight"
SUB_LN_KEYS = "attn.inner_attn_ln.weight attn.inner_attn_ln.bias mlp.ffn_ln.weight mlp.ffn_ln.bias"
SWIGLU_KEYS = "mlp.w1.weight mlp.w1.bias mlp.w2.weight mlp.w2.bias mlp.w3.weight mlp.w3.bias"
TEXT_KEYS = "positional_embedding text_projection token_embedding.weight ln_final.weight ln_final.bias"
TEXT_BLOCK_KEYS = (
    "ln_1.weight ln_1.bias ln_2.weight ln_2.bias attn.in_proj_weight attn.in_proj_bias attn.out_proj.weight "
    "attn.out_proj.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias"
)
EVA01 = (BLOCK_KEYS, LAYER_NORM_KEYS, GELU_KEYS, FUSED_KEYS, BIAS_KEYS)
EVA02 = (BLOCK_KEYS, LAYER_NORM_KEYS, SPLIT_KEYS, BIAS_KEYS, SUB_LN_KEYS, SWIGLU_KEYS)


@pytest.mark.parametrize(
    ("name", "tower", "block"),
    [
        ("EVA01-CLIP-B-16", "norm.bias head.bias", (*EVA01, "gamma_1 gamma_2")),
        ("EVA01-CLIP-g-14", "norm.bias head.bias", EVA01),
        ("EVA02-CLIP-L-14", "norm.bias head.bias", EVA02),
        ("EVA02-CLIP-bigE-14", "norm.bias head.bias", EVA01),
        ("EVA-CLIP-8B", "", (BLOCK_KEYS, GELU_KEYS, FUSED_KEYS)),
        ("EVA-CLIP-18B", "", (BLOCK_KEYS, GELU_KEYS, FUSED_KEYS)),
    ],
)
def test_state_dict_keys_are_the_published_ones(name, tower, block):
    layers = {"layers": 2}
    keys = evaclip.create_model(name, device="meta", vision=layers, text=layers).state_dict().keys()
    expected = {"logit_scale"}
    expected |= {f"visual.{key}" for key in f"{VISION_KEYS} {tower}".split()}
    expected |= {f"visual.blocks.{i}.{key}" for i in range(2) for key in " ".join(block).split()}
    expected |= {f"text.{key}" for key in TEXT_KEYS.split()}
    expected |= {f"text.transformer.resblocks.{i}.{key}" for i in range(2) for key in TEXT_BLOCK_KEYS.split()}
    assert set(keys) == expected


def test_shapes_of_special_parameters():
    state = evaclip.create_model("EVA02-CLIP-L-14-336", device="meta", vision={"layers": 1}).state_dict()
    shapes = {
        "logit_scale": (),
        "visual.cls_token": (1, 1, 1024),
        "visual.pos_embed": (1, 577, 1024),
        "visual.patch_embed.proj.weight": (1024, 3, 14, 14),
        "visual.blocks.0.mlp.w1.weight": (2730, 1024),
        "visual.blocks.0.mlp.ffn_ln.weight": (2730,),
        "visual.blocks.0.mlp.w3.weight": (1024, 2730),
        "visual.head.weight": (768, 1024),
        "text.token_embedding.weight": (49408, 768),
        "text.positional_embedding": (77, 768),
        "text.text_projection": (768, 768),
        "text.transformer.resblocks.0.attn.in_proj_weight": (2304, 768),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_fields_of_the_published_configurations():
    g, digits = CONFIGS["EVA01-CLIP-g-14"].vision, CONFIGS["EVA02-CLIP-tiny-digits"]
    assert (g.head_dim, g.mlp_width, g.drop_path, g.eps) == (88, 6144, 0.4, 1e-6)
    assert CONFIGS["EVA01-CLIP-g-14-plus"].vision.drop_path == 0
    assert (digits.vision.grid, digits.vision.patches, digits.vision.mlp_width) == ((2, 6), 12, 168)
    assert CONFIGS["EVA-CLIP-8B"].text.eps == 1e-5
    eighteen = CONFIGS["EVA-CLIP-18B"].vision
    assert (eighteen.norm, eighteen.post_norm, eighteen.heads) == ("rms", True, 40)


def test_overrides_change_fields_of_a_tower():
    model = evaclip.create_model(
        "EVA02-CLIP-B-16", device="meta", vision={"layers": 2, "width": 256, "heads": 2}, text={"context": 32}
    )
    assert len(model.visual.blocks) == 2
    assert model.visual.blocks[0].mlp.w1.weight.shape == (int(256 * 2.6667), 256)
    assert model.text.positional_embedding.shape == (32, 512)
    assert model.config.vision.width == 256
    assert CONFIGS["EVA02-CLIP-B-16"].vision.width == 768


def test_grid_of_an_image_that_is_no_square():
    visual = evaclip.create_model("EVA02-CLIP-tiny-digits", device="meta").visual
    assert (visual.grid, visual.patches) == ((2, 6), 12)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("EVA02-CLIP-B16", {}, r"no model is called 'EVA02-CLIP-B16' \(did you mean 'EVA02-CLIP-B-16'"),
        ("eva_clip_18b", {}, r"did you mean 'EVA-CLIP-18B'"),
        ("EVA-CLIP-8B", {"vision": {"layer": 2}}, r"vision tower has no field 'layer' \(did you mean 'layers'"),
        ("EVA-CLIP-8B", {"text": {"vocab": 9}}, "text tower has no field 'vocab'.*it has context, vocabulary"),
        ("EVA-CLIP-8B", {"vision": {"layers": "two"}}, "vision tower.s layers is .two.; it must be of type int"),
        ("EVA-CLIP-8B", {"vision": {"heads": 33}}, "width 4096 is not a multiple of heads 33"),
        ("EVA-CLIP-8B", {"vision": {"heads": 16}}, "head dimension 256; 32 to 128 in steps of 8"),
        ("EVA-CLIP-8B", {"vision": {"image_size": 225}}, "image side 225 is not a multiple of patch 14"),
        ("EVA-CLIP-8B", {"vision": {"mlp": "relu"}}, "mlp is 'relu'; choose 'gelu' or 'swiglu'"),
        ("EVA-CLIP-8B", {"vision": {"norm": "batch"}}, "norm is 'batch'; choose 'layer' or 'rms'"),
        ("EVA-CLIP-8B", {"vision": {"ffn_norm": True}}, "ffn_norm is a LayerNorm inside SwiGLU"),
        ("EVA-CLIP-8B", {"vision": {"drop_path": 1.0}}, r"drop_path is 1.0; it must lie in \[0, 1\)"),
    ],
)
def test_errors_name_what_is_known(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaclip.create_model(name, device="meta", **options)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parameters_have_the_dtype_asked_for_and_logit_scale_is_float32(dtype):
    model = evaclip.create_model("EVA02-CLIP-tiny", dtype=dtype)
    assert {p.dtype for p in (*model.visual.parameters(), *model.text.parameters())} == {dtype or torch.float32}
    assert (model.logit_scale.dtype, model.logit_scale.shape) == (torch.float32, ())
    assert math.isclose(model.logit_scale.item(), math.log(1 / 0.07), rel_tol=1e-6)


def test_initial_values_follow_the_published_rule():
    torch.manual_seed(0)
    options = {"layers": 3, "width": 256, "heads": 4, "layer_scale": 0.1}
    model = evaclip.create_model("EVA02-CLIP-B-16", vision=options, text={"layers": 2, "width": 256, "heads": 4})
    expected = {"visual.pos_embed": 0.02, "visual.head.weight": 2e-5, "visual.blocks.2.attn.k_proj.weight": 0.02}
    for i in range(3):
        expected[f"visual.blocks.{i}.attn.proj.weight"] = 0.02 / math.sqrt(2 * (i + 1))
        expected[f"visual.blocks.{i}.mlp.w3.weight"] = 0.02 / math.sqrt(2 * (i + 1))
        expected[f"visual.blocks.{i}.mlp.w1.weight"] = 0.02
    expected |= {"text.token_embedding.weight": 0.02, "text.positional_embedding": 0.01, "text.text_projection": 1 / 16}
    for i in range(2):
        block = f"text.transformer.resblocks.{i}"
        expected |= {f"{block}.attn.in_proj_weight": 1 / 16, f"{block}.attn.out_proj.weight": 1 / 32}
        expected |= {f"{block}.mlp.c_fc.weight": 512**-0.5, f"{block}.mlp.c_proj.weight": 1 / 32}
    state = model.state_dict()
    for key, std in expected.items():
        # The standard deviation of n draws is itself known to 1 / sqrt(2 n): five of these.
        assert math.isclose(state[key].std(), std, rel_tol=5 / math.sqrt(2 * state[key].numel())), key
        assert state[key].mean().abs() < 5 * std / math.sqrt(state[key].numel()), key
    for key, tensor in state.items():
        if key.endswith(("bias", "q_bias", "v_bias")) and "patch_embed" not in key:
            assert not tensor.any(), key
        if "gamma" in key:
            assert (tensor == 0.1).all(), key
        if "norm" in key and key.endswith("weight"):
            assert (tensor == 1).all(), key


def test_a_model_built_on_meta_draws_the_values_of_one_built_at_once():
    torch.manual_seed(3)
    at_once = evaclip.create_model("EVA02-CLIP-tiny-digits")
    later = evaclip.create_model("EVA02-CLIP-tiny-digits", device="meta")
    assert all(p.is_meta for p in later.parameters())
    later.to_empty(device="cpu")
    torch.manual_seed(3)
    later.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(at_once.parameters(), later.parameters(), strict=True))
    images, kept = torch.randn(2, 1, 8, 24), torch.tensor([[1, 7, 3], [0, 11, 2]])
    assert torch.equal(at_once.encode_image(images, kept=kept), later.encode_image(images, kept=kept))


def test_digits_start_from_wide_embeddings_and_an_unscaled_head():
    torch.manual_seed(0)
    state = evaclip.create_model("EVA02-CLIP-tiny-digits").state_dict()
    stds = {"visual.pos_embed": 0.2, "text.positional_embedding": 0.3, "text.token_embedding.weight": 0.3}
    stds |= {"visual.head.weight": 0.07, "visual.blocks.0.mlp.w1.weight": 0.07}
    for key, std in stds.items():
        assert math.isclose(state[key].std(), std, rel_tol=5 / math.sqrt(2 * state[key].numel())), key
