"""transformers' CLIP and SigLIP, and EVA-CLIP's remote code as `evaclip_like` has it, replaced."""

import copy
import pickle

import pytest
import torch
from integrations import evaclip_like, twins
from torch import nn

from evakernels.integrations.transformers import replace

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, "num_hidden_layers": 2}
VISION = {**SIZES, "image_size": 24, "patch_size": 8}
TEXT = {
    **SIZES,
    "vocab_size": 20,
    "max_position_embeddings": 7,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
REMOTE = {
    "remote-E": {"post_layernorm": True},
    "remote-8B": {"use_rms_norm": True, "q_bias": False, "v_bias": False},
    "remote-18B": {"use_rms_norm": True, "post_layernorm": True, "q_bias": False, "v_bias": False},
}


def make(kind, **more):
    torch.manual_seed(0)
    if kind in REMOTE:
        return twins.scrambled(evaclip_like.EvaCLIPModel({**REMOTE[kind], **more}, more))
    config = getattr(transformers, f"{kind}Config")
    text = TEXT | ({"projection_size": 64} if kind == "Siglip" else {})
    made = config(
        vision_config=VISION | more, text_config=text | more, **({"projection_dim": 64} if kind == "CLIP" else {})
    )
    return twins.scrambled(getattr(transformers, f"{kind}Model")(made))


def twin(model):
    replaced = copy.deepcopy(model)
    return replaced, replace(replaced)


def inputs(batch=3):
    ids = torch.randint(3, 20, (batch, 7), generator=torch.Generator().manual_seed(3))
    return twins.images(24, batch), ids


def call(model, images, ids):
    if isinstance(model, evaclip_like.EvaCLIPModel):
        return model.vision_model(images), model.text_model(ids)
    vision, text = model.vision_model(images), model.text_model(ids)
    return vision.last_hidden_state, vision.pooler_output, text.last_hidden_state, text.pooler_output


def equal(these, those):
    return all(torch.equal(x, y) for x, y in zip(these, those, strict=True))


KINDS = ["CLIP", "Siglip", *REMOTE]


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    untouched = make(request.param)
    return untouched, twin(untouched)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_outputs_and_gradients_are_as_exact_as_before(pair, dtype, training):
    untouched, replaced = (model.train(training) for model in pair)
    images, ids = inputs()
    if dtype == torch.bfloat16:
        untouched, replaced, images = (
            copy.deepcopy(untouched).bfloat16(),
            copy.deepcopy(replaced).bfloat16(),
            images.bfloat16(),
        )
    twins.assert_same(untouched, replaced, call, images, ids, autocast=dtype == "autocast")


def test_it_looks_the_same_from_outside_and_can_be_pickled(pair):
    untouched, replaced = (model.eval() for model in pair)
    twins.assert_looks_the_same(untouched, replaced)
    copied = pickle.loads(pickle.dumps(replaced))
    assert equal(call(copied, *inputs()), call(replaced, *inputs()))


def names(report):
    return {name: by for name, by in report.replaced.items() if "layers.1" not in name}


LAYER = {
    "": "add_norm",
    ".self_attn": "attention",
    ".layer_norm1": "layer_norm",
    ".layer_norm2": "layer_norm",
}
GELU = "two matrix products and an activation: there is nothing to fuse"


def layer(tower):
    return {f"{tower}.encoder.layers.0{name}": by for name, by in LAYER.items()}


def mlps(*towers):
    return {f"{tower}.encoder.layers.{i}.mlp": GELU for tower in towers for i in (0, 1)}


def test_what_is_replaced_and_what_not_is_reported_by_name():
    report = twin(make("CLIP"))[1]
    norms = "vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm"
    both = layer("vision_model") | layer("text_model")
    assert names(report) == both | dict.fromkeys(norms, "layer_norm")
    assert report.left == mlps("vision_model", "text_model")

    report = twin(make("Siglip"))[1]
    norms = "vision_model.head.layernorm", "vision_model.post_layernorm", "text_model.final_layer_norm"
    assert names(report) == both | dict.fromkeys(norms, "layer_norm")
    pooling = {
        "vision_model.head.attention": "its queries are not the tokens that it attends to",
        "vision_model.head.mlp": GELU,
    }
    assert report.left == mlps("vision_model", "text_model") | pooling

    report = twin(make("remote-18B").vision_model)[1]
    assert names(report) == {
        "encoder.layers.0": "norm_add, twice",
        "encoder.layers.0.self_attn": "attention",
        "encoder.layers.0.layer_norm1": "rms_norm",
        "encoder.layers.0.layer_norm2": "rms_norm",
        "post_layernorm": "rms_norm",
    }


@pytest.mark.parametrize("kind", ["CLIP", "remote-E"])
def test_undo_restores_the_model(kind):
    model = make(kind)
    before = twins.state(model)
    report = replace(model)
    assert twins.state(model) != before
    report.undo()
    assert twins.state(model) == before


@pytest.mark.parametrize(("kind", "tower"), [("CLIP", "text_model"), ("remote-18B", "vision_model")])
def test_it_compiles_without_a_graph_break(kind, tower):
    model = twin(make(kind, num_hidden_layers=1).get_submodule(tower))[0]

    def features(model, x):
        out = model(x)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state

    twins.assert_compiles_alike(model, features, inputs()[tower == "text_model"])


def test_recomputed_activations_give_the_same_gradients_as_kept_ones():
    model = twin(make("CLIP"))[0].train()
    expected = twins.results(model, call, *inputs())
    model.gradient_checkpointing_enable()
    calls = []
    model.vision_model.encoder.layers[0].layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    found = twins.results(model, call, *inputs())
    assert len(calls) == 2  # forward, and again in the backward
    assert equal(found[1].values(), expected[1].values())


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "remote-8B"])
def test_padding_is_hidden_as_before(kind):
    untouched = make(kind).eval()
    replaced = twin(untouched)[0]
    ids, mask = inputs()[1], torch.ones(3, 7, dtype=torch.long)
    mask[:, 4:] = 0

    def text(model, **options):
        out = model.text_model(ids, **options)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state

    expected = text(untouched, attention_mask=mask)
    torch.testing.assert_close(text(replaced, attention_mask=mask), expected)
    assert not torch.allclose(text(replaced), expected)
    torch.testing.assert_close(text(replaced, attention_mask=torch.ones_like(mask)), text(untouched))


def test_clips_text_is_causal_and_siglips_is_not():
    for kind, causal in (("CLIP", True), ("Siglip", False)):
        text, ids = twin(make(kind).eval())[0].text_model, inputs()[1]
        other = ids.clone()
        other[:, -1] = (other[:, -1] - 2) % 17 + 3
        before, after = (text(x).last_hidden_state[:, :-1] for x in (ids, other))
        assert torch.equal(before, after) == causal


def test_attention_weights_are_given_where_asked_for():
    untouched = make("remote-8B").eval()
    replaced = twin(untouched)[0]
    images = inputs()[0]
    found, expected = (model.vision_model(images, output_attentions=True) for model in (replaced, untouched))
    torch.testing.assert_close(found, expected)
    assert found[1][0].shape == (3, 2, 9, 9)
    model = make("CLIP").eval()
    replaced = twin(model)[0]
    for each in (model, replaced):
        each.set_attn_implementation("eager")
    found, expected = (each.vision_model(images, output_attentions=True).attentions for each in (replaced, model))
    torch.testing.assert_close(found, expected)
    report = twin(model)[1]
    assert report.left["vision_model.encoder.layers.0.self_attn"] == (
        'it is to give its weights: config._attn_implementation is "eager"; load it with "sdpa"'
    )


def test_dropout_of_attention_weights_is_the_originals():
    untouched = make("CLIP", attention_dropout=0.5).train()
    replaced = twin(untouched)[0]
    torch.manual_seed(0)
    expected = untouched.vision_model(inputs()[0]).pooler_output
    torch.manual_seed(0)
    torch.testing.assert_close(replaced.vision_model(inputs()[0]).pooler_output, expected)
    twins.assert_same(untouched.eval(), replaced.eval(), call, *inputs())


def test_hidden_states_and_hooks_are_as_before():
    untouched = make("CLIP").eval()
    replaced = twin(untouched)[0]
    states = [
        model.vision_model(inputs()[0], output_hidden_states=True).hidden_states for model in (replaced, untouched)
    ]
    torch.testing.assert_close(*states)
    assert len(states[0]) == 3
    seen = []
    for name in ("layer_norm2", "self_attn.q_proj", "self_attn"):
        module = replaced.vision_model.encoder.layers[0].get_submodule(name)
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    torch.testing.assert_close(
        replaced.vision_model(inputs()[0]).pooler_output, untouched.vision_model(inputs()[0]).pooler_output
    )
    assert sorted(seen) == ["layer_norm2", "self_attn", "self_attn.q_proj"]


def test_an_adapter_in_place_of_a_projection_is_called():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    untouched = make("CLIP").eval()
    for model in (untouched, replaced := twin(untouched)[0]):
        attn = model.vision_model.encoder.layers[0].self_attn
        attn.q_proj = Adapter(attn.q_proj)
    torch.testing.assert_close(*(call(model, *inputs()) for model in (replaced, untouched)))


def test_a_model_that_only_contains_a_tower_is_replaced_there_alone():
    model = nn.ModuleDict({"tower": make("CLIP").vision_model, "other": nn.LayerNorm(8)})
    report = replace(model)
    assert all(name.startswith("tower.") for name in report.replaced) and type(model["other"]) is nn.LayerNorm


@pytest.mark.parametrize("kind", ["CLIP", "remote-8B"])
def test_what_is_not_covered_stays_and_says_why(kind):
    report = twin(make(kind, num_attention_heads=4))[1]
    why = "its head dimension is 16; attention serves 32 to 128 in steps of 8"
    assert report.left["vision_model.encoder.layers.0.self_attn"] == why
    model = make("remote-8B")

    class EvaCLIPEncoderLayer(evaclip_like.EvaCLIPEncoderLayer):
        def forward(self, hidden_states):
            return hidden_states

    model.vision_model.encoder.layers[1].__class__ = EvaCLIPEncoderLayer
    assert (
        "are not those of the EvaCLIPEncoderLayer that is covered: self hidden_states attention_mask causal_"
        in (replace(model).left["vision_model.encoder.layers.1"])
    )


def test_wrong_models_are_refused_with_words():
    with pytest.raises(TypeError, match="give a CLIP, SigLIP or EvaCLIP model of transformers"):
        replace(nn.Sequential(nn.LayerNorm(4)))
    model = make("CLIP")
    replace(model)
    with pytest.raises(ValueError, match="has been replaced before"):
        replace(model)
