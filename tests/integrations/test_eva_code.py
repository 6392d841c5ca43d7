"""`integrations.eva` and the stand-ins against the original code itself: `pytest --eva-code PATH`.

PATH is a checkout of github.com/baaivision/EVA. Its `eva_clip` needs einops, ftfy and torchvision besides. Every one of
its configurations is built with its own options, two blocks deep and two heads wide.
"""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from integrations import twins

from benchmarks.bench_integrations import Xops
from evakernels.integrations import eva, stand_ins

FOLDERS = {"rei": "EVA-CLIP/rei", "shinji": "EVA-CLIP-18B/shinji"}


@pytest.fixture(scope="module", params=FOLDERS)
def code(request):
    """The package `eva_clip`, imported with stand-ins for what cannot be installed here."""
    path = request.config.getoption("--eva-code")
    if path is None:
        pytest.skip("needs the original code: --eva-code PATH to a checkout of github.com/baaivision/EVA")
    pytest.importorskip("einops", reason="eva_clip imports einops")
    stands = stand_ins.install("xformers", "apex")
    root = str(Path(path) / FOLDERS[request.param])
    sys.path.insert(0, root)
    try:
        yield importlib.import_module("eva_clip")
    finally:
        sys.path.remove(root)
        for name in [name for name in sys.modules if name.partition(".")[0] == "eva_clip"]:
            del sys.modules[name]
        stands.undo()


def configurations(code):
    for file in sorted((Path(code.__file__).parent / "model_configs").glob("EVA*.json")):
        yield file.stem, json.loads(file.read_text())


def shrunk(code, config, **vision):
    """A model of a published configuration: its head dimension, norms, biases and layouts, but small."""
    config = copy.deepcopy(config)
    cfg, text = config["vision_cfg"], config["text_cfg"]
    patch = cfg["patch_size"]
    cfg |= {
        "layers": 2,
        "width": 2 * cfg.setdefault("head_width", 64),
        "image_size": 4 * patch,
        "mlp_ratio": 2.67,
    } | vision
    cfg.setdefault("drop_path_rate", 0.0)
    text |= {"layers": 2, "width": 64, "heads": 1, "context_length": 12, "vocab_size": 50}
    torch.manual_seed(0)
    model = twins.scrambled(code.CustomCLIP(16, cfg, text))
    with torch.no_grad():
        model.visual.head.weight.normal_()  # theirs begins next to zero
    return model, cfg


def use_pytorchs(monkeypatch):
    """The original's attention by PyTorch's."""
    for name in ("eva_vit_model", "transformer"):
        monkeypatch.setattr(sys.modules[f"eva_clip.{name}"], "xops", Xops)


def both(model, images, ids):
    return model.visual(images), model.text(ids)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropping", [False, True])
def test_every_configuration_is_as_exact_as_before(code, dropping, autocast, monkeypatch):
    use_pytorchs(monkeypatch)
    tried = 0
    for name, config in configurations(code):
        options = {"patch_dropout": 0.5, "drop_path_rate": 0.5} if dropping else {}
        model, cfg = shrunk(code, config, **options)
        monkeypatch.setenv("RoPE", "1" if cfg.get("rope") else "0")
        ids = torch.randint(0, 49, (3, 12), generator=torch.Generator().manual_seed(1))
        images = twins.images(cfg["image_size"], 3)
        untouched = copy.deepcopy(model)
        report = eva.replace(model)
        assert {why.partition(":")[0] for why in report.left.values()} <= {"two matrix products and a GELU"}, name
        assert type(model.visual).__name__ == "EVAVisionTransformer" and "visual" in report.replaced
        twins.assert_looks_the_same(untouched, model)
        twins.assert_same(untouched, model, both, images, ids, autocast=autocast)
        report.undo()
        tried += 1
    assert tried >= 8


def test_the_stand_ins_serve_the_untouched_code(code):
    for name, config in configurations(code):
        model, cfg = shrunk(code, config)
        model.eval()
        inputs = twins.images(cfg["image_size"]), torch.randint(0, 49, (2, 12))
        found = both(model, *inputs)
        fused = {type(module) for module in model.modules() if type(module).__name__ == "FusedLayerNorm"}
        assert fused == ({stand_ins.FusedLayerNorm} if cfg.get("fusedLN") else set()), name
        with pytest.MonkeyPatch.context() as monkeypatch:
            use_pytorchs(monkeypatch)
            torch.testing.assert_close(found, both(model, *inputs))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_theirs(code, smoothing):
    features = [torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    found, expected = (loss(smoothing=smoothing)(*features, scale) for loss in (eva.ClipLoss, code.ClipLoss))
    torch.testing.assert_close(found[0], expected[0])
    assert {key: float(value) for key, value in found[1].items()} == pytest.approx(
        {key: float(value) for key, value in expected[1].items()}
    )
    leaves = *features, scale
    torch.testing.assert_close(torch.autograd.grad(found[0], leaves), torch.autograd.grad(expected[0], leaves))
