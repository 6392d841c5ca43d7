"""What docs/integrations.md shows is run as it is written."""

import re
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from integrations import eva_like

from evakernels.integrations.timm import replace

PAGE = (Path(__file__).parents[2] / "docs/integrations.md").read_text()


def section(name):
    return PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]


def run(name, **given):
    """What the section's examples leave behind, each with a fresh copy of what is given."""
    found = []
    for block in re.findall(r"```python\n(.*?)```", section(name), re.DOTALL):
        found.append({key: make() for key, make in given.items()})
        exec(block, found[-1])
    return found


def eva():
    return timm.create_model(
        "eva02_base_patch16_clip_224", img_size=32, embed_dim=64, num_heads=1, depth=1, patch_drop_rate=0.5
    )


def test_the_examples_for_timm_run():
    plain, drawing = run("timm", model=eva)
    assert plain["report"].replaced["patch_drop"] == "gather_tokens"
    x = torch.randn(2, 5, 64)
    assert torch.equal(drawing["model"].patch_drop(x)[1], drawing["model"].patch_drop(x)[1])  # by the seed alone


def test_the_report_shown_is_that_of_the_model_named():
    shown = re.search(r"<!-- report:timm -->\n```\n(.*?)\n```", PAGE, re.DOTALL)[1]
    model = timm.create_model("eva02_large_patch14_clip_224", img_size=28, embed_dim=64, num_heads=1, num_classes=0)
    assert str(replace(model)) == shown


def test_the_examples_for_open_clip_run():
    tower = {"layers": 1, "width": 64}
    vision, text = tower | {"patch_size": 8, "image_size": 16}, tower | {"context_length": 8, "vocab_size": 32}

    def model():
        return open_clip.CLIP(16, vision | {"head_width": 64}, text | {"heads": 1}, output_dict=True)

    first, second = run("open_clip", model=model, loss=open_clip.ClipLoss)
    assert first["report"].replaced and first["report_of_loss"].replaced == {"": "contrastive_loss"}
    loss = first["loss"](**first["model"](torch.randn(2, 3, 16, 16), torch.randint(1, 32, (2, 8))))
    loss.backward()
    second["optimizer"].step()
    assert [group["weight_decay"] for group in second["optimizer"].param_groups] == [0.0, 0.05]


def test_the_examples_for_the_original_eva_clip_code_run():
    first, second = run("The original EVA-CLIP code", model=lambda: eva_like.CustomCLIP({"rope": True, "xattn": True}))
    assert first["report"].replaced["visual.blocks.0.attn"] == "attention_qkvpacked, rotary embedding included"
    value, accuracies = second["loss"](*first["model"](torch.randn(2, 3, 24, 24), torch.randint(0, 20, (2, 7))))
    assert value.requires_grad and set(accuracies) == {"i2t", "t2i"}


def test_the_example_for_transformers_runs():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPVisionConfig(intermediate_size=32, **sizes)
    (found,) = run("transformers", model=lambda: transformers.CLIPVisionModel(config))
    assert found["report"].replaced["encoder.layers.0.self_attn"] == "attention"


def test_the_example_for_stand_ins_runs():
    (found,) = run("Stand-ins for xformers, apex and deepspeed")
    assert {*found["stands"].installed, *found["stands"].skipped} == {"xformers", "apex", "deepspeed"}
    found["stands"].undo()
