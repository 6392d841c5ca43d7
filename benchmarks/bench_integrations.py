"""A training step of models of other codebases, untouched and replaced by `evakernels.integrations`."""

import copy
import importlib
import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness

MODE = "step"  # forward and backward, without the optimizer
# Of timm's entry points: images on a CPU, where one block is enough; and sizes to try whether it runs.
TIMM = {
    "eva02_base_patch16_clip_224": (8, {"img_size": 64, "embed_dim": 128, "num_heads": 2}),
    "eva02_large_patch14_clip_224": (4, {"img_size": 56, "embed_dim": 128, "num_heads": 2}),
    "eva02_enormous_patch14_clip_224": (2, {"img_size": 56, "embed_dim": 224, "num_heads": 2, "mlp_ratio": 2}),
}
GPU_BLOCKS, GPU_IMAGES = 4, 128
KEEPS_ANGLES = "RoPE"  # the environment variable by which EVA-CLIP's code turns kept patches by their own angles


def timm_case(name: str, quick: bool) -> tuple[str, nn.Module, tuple[Tensor, ...], Callable]:
    """What is timed: in words, the model, its inputs, and the scalar to differentiate."""
    timm = importlib.import_module("timm")
    images, tiny = TIMM[name]
    depth, batch = (GPU_BLOCKS, GPU_IMAGES) if harness.device().type == "cuda" else (1, images)
    if quick:
        batch = 2
    options = {"depth": depth} | (tiny if quick else {})
    model = timm.create_model(name, patch_drop_rate=0.5, drop_path_rate=0.1, num_classes=16, **options)
    side = model.patch_embed.img_size[0]
    words = (
        f"timm {name}, {depth} of its blocks, width {model.embed_dim}, {batch} images of {side} px, half the patches"
    )
    return words, model, (torch.randn(batch, 3, side, side),), lambda out: out.float().square().mean()


class WithLoss(nn.Module):
    """An open_clip model and its loss."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.loss(**self.model(images, texts))


def open_clip_case(quick: bool) -> tuple[str, nn.Module, tuple[Tensor, ...], Callable]:
    """ViT-B/32's widths, or narrow ones, with the contrastive loss."""
    open_clip = importlib.import_module("open_clip")
    layers, batch = (GPU_BLOCKS, 512) if harness.device().type == "cuda" else (1, 16)
    side, vocabulary, context = (64, 64, 16) if quick else (224, 49408, 77)
    width, text_width = (64, 64) if quick else (768, 512)
    vision = {"layers": layers, "width": width, "head_width": 64, "patch_size": 32, "image_size": side}
    text = {"layers": layers, "width": text_width, "heads": text_width // 64, "vocab_size": vocabulary}
    text["context_length"] = context
    model = open_clip.CLIP(text_width, vision, text, output_dict=True)
    texts = torch.randint(1, vocabulary, (batch, context))
    words = f"open_clip ViT-B-32, {layers} layers of {width} and of {text_width}, {batch} pairs"
    return words, WithLoss(model, open_clip.ClipLoss()), (torch.randn(batch, 3, side, side), texts), lambda loss: loss


def transformers_case(quick: bool) -> tuple[str, nn.Module, tuple[Tensor, ...], Callable]:
    """The same widths in transformers' CLIP."""
    transformers = importlib.import_module("transformers")
    layers, batch = (GPU_BLOCKS, 512) if harness.device().type == "cuda" else (1, 16)
    side, vocabulary, context = (64, 64, 16) if quick else (224, 49408, 77)
    width, text_width = (64, 64) if quick else (768, 512)

    def tower(width: int, **more: int) -> dict:
        heads = {"num_attention_heads": width // 64, "num_hidden_layers": layers}
        return {"hidden_size": width, "intermediate_size": 4 * width, **heads, **more}

    text = tower(text_width, vocab_size=vocabulary, max_position_embeddings=context)
    vision = tower(width, image_size=side, patch_size=32)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=text_width)
    model = transformers.CLIPModel(config)
    texts = torch.randint(1, vocabulary, (batch, context))
    words = f"transformers CLIP, {layers} layers of {width} and of {text_width}, {batch} pairs"
    return words, WithOwnLoss(model), (torch.randn(batch, 3, side, side), texts), lambda loss: loss


class WithOwnLoss(nn.Module):
    """A transformers model, which has its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.model(input_ids=texts, pixel_values=images, return_loss=True).loss


def eva_case(quick: bool) -> tuple[str, nn.Module, tuple[Tensor, ...], Callable]:
    """EVA-CLIP's own code, where its folder `rei` or `shinji` is on the path: EVA02-CLIP-B-16 as a whole."""
    eva_clip = importlib.import_module("eva_clip")
    for module in (eva_clip.eva_vit_model, eva_clip.transformer):
        if module.xops is None:  # without xformers it would not run
            module.xops = Xops
    batch = 64 if harness.device().type == "cuda" else 2
    os.environ[KEEPS_ANGLES] = "1"
    model = eva_clip.create_model("EVA02-CLIP-B-16", force_custom_clip=True, force_patch_dropout=0.5)
    texts = torch.randint(1, 49407, (batch, 77))
    words = f"EVA-CLIP's code, EVA02-CLIP-B-16, {batch} pairs, half the patches, PyTorch's attention for xformers'"
    return words, model, (torch.randn(batch, 3, 224, 224), texts), lambda out: (out[0] * out[1]).sum()


class Xops:
    """PyTorch's attention in the place of xformers.ops.

    Like xformers' and like this package's it takes the sums of the rows of dP * P from the rounded output, which is
    less exact than the plain formula where a softmax is nearly one-hot.
    """

    LowerTriangularMask = object

    @staticmethod
    def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0, scale=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=attn_bias is not None)
        return y.transpose(1, 2)


def steps(case: tuple, integration: str, half: bool) -> harness.Providers:
    """The step, replaced and untouched, eager and compiled."""
    replace = importlib.import_module(f"evakernels.integrations.{integration}").replace
    _, model, inputs, scalar = case
    device = harness.device()
    untouched = model.to(device).train()
    replaced = copy.deepcopy(untouched)
    replace(replaced)
    inputs = tuple(x.to(device) for x in inputs)

    def step(model: nn.Module, forward: Callable) -> Callable[[], object]:
        def run() -> object:
            model.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = scalar(forward(*inputs))
            return loss.backward()

        return run

    found: harness.Providers = {"evakernels": step(replaced, replaced), "untouched": step(untouched, untouched)}
    for name, one in (("untouched, torch.compile", untouched), ("evakernels, torch.compile", replaced)):
        compiled = harness.compiled(copy.deepcopy(one))
        found[name] = compiled if isinstance(compiled, str) else step(compiled, compiled)  # type: ignore[arg-type]
    return found


def rows(quick: bool) -> Iterator[dict]:
    """Each codebase's models; on a GPU under autocast in bfloat16."""
    half = harness.device().type == "cuda"
    cases = [("timm", lambda name=name: timm_case(name, quick)) for name in TIMM]
    cases += [("open_clip", lambda: open_clip_case(quick)), ("transformers", lambda: transformers_case(quick))]
    cases += [("eva", lambda: eva_case(quick))]
    for integration, make in cases:
        if isinstance(absent := harness.peer("eva_clip" if integration == "eva" else integration), str):
            yield from harness.compare("integrations", integration, "", MODE, {"evakernels": absent})
            continue
        torch.manual_seed(0)
        case = make()
        dtype = torch.bfloat16 if half else torch.float32
        yield from harness.compare("integrations", case[0], dtype, MODE, steps(case, integration, half), quick=quick)
