"""A folder to publish: weights, configuration, preprocessing and a model card, as open_clip and the hub expect them."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaclip.data.preprocess import MEAN, STD
from evaclip.data.tokenizer import ClipTokenizer
from evaclip.models import create_model
from evaclip.models.clip import CLIP
from evaclip.models.config import CONFIGS, ClipConfig, VisionConfig
from evaclip.weights.convert import SHARD_SIZE, in_dialect, in_dtype, model_of, recipe_of_run, write_safetensors
from evaclip.weights.dialects import Pieces
from evaclip.weights.files import locate
from evaclip.weights.load import read_pieces

if TYPE_CHECKING:
    from evaclip.train.recipe import Recipe

CONFIG, OPEN_CLIP = "config.json", "open_clip_config.json"
# Whose image towers timm has, under which name; open_clip builds them from it.
TIMM = {
    "EVA01-CLIP-g-14": "eva_giant_patch14_clip_224",
    "EVA02-CLIP-B-16": "eva02_base_patch16_clip_224",
    "EVA02-CLIP-L-14": "eva02_large_patch14_clip_224",
    "EVA02-CLIP-L-14-336": "eva02_large_patch14_clip_336",
    "EVA02-CLIP-bigE-14": "eva02_enormous_patch14_clip_224",
}
_TRAINING_ONLY: dict[str, Any] = {"drop_path": 0.0, "init_std": 0.0, "position_init_std": 0.0, "head_init_scale": 0.0}


def export(
    source: str | Path,
    folder: str | Path,
    *,
    model: CLIP | None = None,
    dtype: torch.dtype | None = None,
    shard_size: float = SHARD_SIZE,
) -> list[Path]:
    """Write a folder that can be uploaded to the Hugging Face hub as it is.

    `evaclip.load` reads it; and where open_clip has the image tower (EVA01 and EVA02 but EVA01-CLIP-B-16), so does
    `open_clip.create_model_from_pretrained("local-dir:FOLDER")`, or "hf-hub:owner/name" once it is uploaded.

    Args:
        source: a whole model: a run of `evaclip train` or one of its checkpoints, a file, a folder, a name of the hub.
        folder: to be made.
        model: whose weights they are; it may be on the meta device. None: the run's, or the published one whose shapes
            they have.
        dtype: as of `convert`.
        shard_size: GB, the largest file; open_clip reads but one file, so for it there is no such limit.

    Returns:
        the files.

    Raises:
        FileNotFoundError: no such source.
        FileExistsError: the folder is there already.
        ValueError: the source does not fit the model, or it is not known which model or which tokenizer it has.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; nothing is overwritten, so give another name")
    source = locate(source)
    recipe = recipe_of_run(source)
    if model is None:
        model = model_of(recipe) if recipe else create_model(identified(source, read_pieces(source)), device="meta")
    config, tokenizer = model.config, recipe.data.tokenizer if recipe else "clip"
    if recipe is None and config.text.vocabulary != ClipTokenizer.vocabulary_size:
        raise ValueError(
            f"{source} has a vocabulary of {config.text.vocabulary}, CLIP's has {ClipTokenizer.vocabulary_size}; "
            "export the run that trained it, whose recipe names the tokenizer"
        )
    trunk = timm_name(config.vision) if tokenizer == "clip" and config.text.eps == 1e-5 else None
    tensors, _, _ = in_dialect(source, "open_clip" if trunk else "native", model=model)
    if dtype is not None:
        tensors = {key: in_dtype(key, tensor, dtype) for key, tensor in tensors.items()}
    texts = {CONFIG: _config(config, tokenizer)}
    if tokenizer == "clip" and config.vision.channels == 3:
        texts["preprocessor_config.json"] = _preprocessor(config.vision)
    if trunk:
        texts[OPEN_CLIP] = _open_clip(config, trunk)
    if recipe:
        texts["recipe.json"] = dataclasses.asdict(recipe)
    parameters = sum(tensor.numel for tensor in tensors.values())
    card = _card(folder.name, config, tokenizer, recipe, parameters, open_clip=trunk is not None)
    name, largest = ("open_clip_model.safetensors", float("inf")) if trunk else ("model.safetensors", shard_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        write_safetensors(tensors, partial / name, largest)
        for file, content in texts.items():
            (partial / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(folder)  # the name appears only when the content is complete
    return sorted(folder.iterdir())


def exported(folder: Path) -> tuple[ClipConfig, str] | None:
    """The model and the tokenizer of a folder that `export` wrote; None: it did not."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if values.pop("model_type") != "evaclip":
            return None
        tokenizer = values.pop("tokenizer")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    from evaclip.train.recipe import from_dict  # it stands on this package

    return from_dict(ClipConfig, values, str(folder / CONFIG)), tokenizer


def identified(source: Path, pieces: Pieces) -> str:
    """The name of the published model that has these pieces' shapes.

    Raises:
        ValueError: none has.
    """

    def blocks(prefix: str) -> int:
        return len({p.removeprefix(prefix).split(".")[0] for p in pieces.tensors if p.startswith(prefix)})

    def shape(piece: str) -> tuple[int, ...]:
        return pieces.tensors[piece].shape if piece in pieces.tensors else ()

    found = (
        shape("visual.pos_embed"),
        shape("text.text_projection"),
        blocks("visual.blocks."),
        blocks("text.transformer.resblocks."),
        any(".mlp.w1." in piece for piece in pieces.tensors),
    )
    for name, config in CONFIGS.items():
        vision, text = config.vision, config.text
        shapes = (1, 1 + vision.patches, vision.width), (text.width, config.embed_dim)
        if found == (*shapes, vision.layers, text.layers, vision.mlp == "swiglu"):
            return name
    raise ValueError(f"{source} has the shapes of no model that `evaclip models` lists; say which it is")


def timm_name(vision: VisionConfig) -> str | None:
    """timm's name of an image tower; None: timm has no such one."""

    def computed(config: VisionConfig) -> VisionConfig:
        return dataclasses.replace(config, **_TRAINING_ONLY)

    same = (name for name, timm in TIMM.items() if computed(CONFIGS[name].vision) == computed(vision))
    return TIMM.get(next(same, ""))


def _config(config: ClipConfig, tokenizer: str) -> dict[str, Any]:
    return {"model_type": "evaclip", **dataclasses.asdict(config), "tokenizer": tokenizer}


def _open_clip(config: ClipConfig, trunk: str) -> dict[str, Any]:
    text = config.text
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": {
                "image_size": config.vision.image_size,
                "timm_model_name": trunk,
                "timm_model_pretrained": False,
                "timm_pool": "token",
                "timm_proj": None,
            },
            "text_cfg": {
                "context_length": text.context,
                "vocab_size": text.vocabulary,
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
                "mlp_ratio": text.mlp_ratio,
            },
            "custom_text": True,
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def _preprocessor(vision: VisionConfig) -> dict[str, Any]:
    height, width = vision.image
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def _card(
    name: str, config: ClipConfig, tokenizer: str, recipe: "Recipe | None", parameters: int, *, open_clip: bool
) -> str:
    """The model card: what the model is, how it was trained, how it is used."""
    vision, text = config.vision, config.text
    height, width = vision.image
    lines = [
        "---",
        "tags:",
        "- clip",
        "- eva-clip",
        f"library_name: {'open_clip' if open_clip else 'evaclip'}",
        "pipeline_tag: zero-shot-image-classification",
        "---",
        f"# {name}",
        "",
        f"A model of images and captions: {config.name}, {parameters:,} parameters.",
        "",
        "| | |",
        "|---|---|",
        f"| images | {height} x {width} pixels, {vision.channels} channels, patches of {vision.patch} |",
        f"| image tower | {vision.layers} layers of {vision.width}, {vision.heads} heads |",
        f"| text tower | {text.layers} layers of {text.width}, {text.heads} heads, {text.context} tokens |",
        f"| features | {config.embed_dim} |",
        f"| tokenizer | {'that of CLIP' if tokenizer == 'clip' else tokenizer} |",
        "",
    ]
    if recipe:
        data, optimizer, schedule = recipe.data, recipe.optimizer, recipe.schedule
        sources = [mixed.source for mixed in data.mixture] or [data.source]
        steps = f"{schedule.steps:,} steps" if schedule.steps else f"{schedule.samples:,} samples"
        starts = [f"{key}: `{value}`" for key, value in vars(recipe.model).items() if "checkpoint" in key and value]
        lines += [
            "## Training",
            "",
            "By `evaclip train`; `recipe.json` holds every setting.",
            "",
            f"- data: {', '.join(f'`{source}`' for source in sources)}",
            f"- {steps}, batches of {data.batch_size:,}, patch dropout {data.patch_drop}",
            f"- {optimizer.name}, learning rates {optimizer.visual_lr} (image), {optimizer.text_lr} (text)",
            f"- precision {recipe.compute.precision}",
            *([f"- started from {'; '.join(starts)}"] if starts else ["- started from random values"]),
            "",
        ]
    lines += [
        "## Use",
        "",
        "```python",
        "import evaclip",
        "",
        f'model, tokenizer, preprocess = evaclip.load("{name}")  # the folder',
        "```",
    ]
    if open_clip:
        lines += [
            "",
            "```python",
            "import open_clip",
            "",
            f'model, preprocess = open_clip.create_model_from_pretrained("local-dir:{name}")',
            f'tokenizer = open_clip.get_tokenizer("local-dir:{name}")',
            "```",
        ]
    return "\n".join(lines) + "\n"
