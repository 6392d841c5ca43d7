"""A training run as data: frozen dataclasses, read from TOML or JSON, overridable field by field.

The text under each field is what `evaclip train <recipe> --help` prints.
"""

import dataclasses
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from evaclip.files import write_text
from evaclip.models import configure
from evaclip.recipes import recipe_files

Override = int | float | bool | str | tuple[int, int]


class RecipeError(ValueError):
    """A recipe that cannot be run as it is; the message names the file, the key and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = "EVA02-CLIP-B-16"
    """One of `evaclip models`."""
    checkpoint: str | None = None
    """Weights of a whole model to start from, a path or a name of the hub; positions may be of another grid."""
    image_checkpoint: str | None = None
    """Weights the vision tower starts from, of a masked image model or a CLIP; its head starts anew."""
    text_checkpoint: str | None = None
    """Weights the text tower starts from, of a CLIP; its projection starts anew."""
    vision: dict[str, Override] = field(default_factory=dict)
    """Fields of the vision tower to override, e.g. layers 2 width 256 (.layers 2 where the recipe sets it already)."""
    text: dict[str, Override] = field(default_factory=dict)
    """Fields of the text tower to override."""


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """One data set of a mixture."""

    source: str
    """As data.source; .tar shards."""
    weight: float = 1.0
    """Its share of each batch, in any unit."""


@dataclass(frozen=True, kw_only=True)
class Data:
    source: str = "digits"
    """"digits"; a folder of images with captions beside them; a CSV/TSV/JSONL of image and caption; or .tar shards: a
    folder of them, a pattern ("*.tar", "{000..099}.tar"), "pipe:command" or an address like "s3://bucket/{0..9}.tar"."""
    mixture: tuple[Mixed, ...] = ()
    """Data sets that share each batch, as [{source = "...", weight = 4}, ...]; unless `source` is given, which goes
    before it."""
    mode: Literal["epoch", "resampled"] = "epoch"
    """Shards: each sample once per epoch, or shards drawn anew, of which only those drawn are read."""
    workers: int = 4
    """Processes per rank that read shards (0: none but the trainer's), or threads that read a folder."""
    decode: Literal["fast", "exact"] = "fast"
    """Shards: decode large JPEGs at a half, quarter or eighth of their size, or in full as open_clip does."""
    cache: str | None = None
    """Folder for copies of shards from elsewhere and for indexes; default: ~/.cache/evaclip."""
    cache_gb: float = 0.0
    """Room for these copies, GB, beyond which those used longest ago are removed; 0: all stay."""
    batch_size: int = 128
    """Samples per optimizer step, over all micro-batches."""
    tokenizer: str = "clip"
    """"clip", or "words:" and a closed list of words."""
    patch_drop: float = 0.0
    """Share of image patches left out in training (arXiv 2212.00794)."""
    undropped_tail: float = 0.0
    """Share of the steps, at the end (of each phase), that see whole images."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Share of an image's area that the random crop of training keeps, from and to."""
    max_unreadable: float = 0.01
    """Share of the images that may be unreadable, beyond nine, before the run stops; they are named and replaced."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: Literal["lamb", "adamw"] = "lamb"
    """Published EVA-CLIP runs use LAMB."""
    logit_scale_lr: float = 5e-4
    """Peak learning rate of logit_scale."""
    visual_lr: float = 4e-4
    """Peak learning rate of the vision tower's head; lower layers take less by the layer decay."""
    text_lr: float = 4e-5
    """Peak learning rate of the text tower's last layers."""
    visual_layer_decay: float = 1.0
    """Each layer below the head learns this many times as fast as the one above it."""
    text_layer_decay: float = 1.0
    """The same for the text tower."""
    weight_decay: float = 0.05
    """Decoupled; norms, biases, positions, the class token and logit_scale take none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    clip_grad_norm: float = 5.0
    """Largest global gradient norm; 0 turns clipping off."""
    bias_correction: Literal["update", "step_size", "none"] = "update"
    """LAMB: "step_size" with bounds [0.01, 10] and adapt_excluded is the optimizer of the published runs."""
    trust: Literal["parameter", "group"] | tuple[Literal["shard"], int] = "parameter"
    """LAMB: one trust ratio per parameter, per group (tower, layer, decay), or per slice of it, as "shard" 112."""
    trust_ratio_bounds: tuple[float, float] | None = None
    """LAMB: clamp of the trust ratio."""
    adapt_excluded: bool = False
    """LAMB: apply the trust ratio also where no weight decay is applied."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    steps: int = 0
    """Optimizer steps in all; 0: as many as `samples`, or the samples of the phases, fill (without either, 1000)."""
    samples: int = 0
    """Samples seen in all, repetitions counted; used where `steps` is 0."""
    warmup: int = 50
    """Steps of linear warm-up; a cosine to zero follows."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    label_smoothing: float = 0.0
    """Probability mass spread over the whole batch."""
    max_logit_scale: float = 100.0
    """logit_scale is held between 1 and this after every step."""
    fixed_logit_scale: float | None = None
    """A constant scale (EVA-CLIP-8B and 18B: 100) instead of a learned one."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda", "cuda:1"."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16", "bf16", "fp16"] = "fp32"
    """float32; bfloat16 or float16 autocast over float32 weights; or such weights, with masters in the optimizer."""
    loss_scale: float = 65536.0
    """float16: what the loss is multiplied with at first; halved where gradients overflow, their step is skipped."""
    loss_scale_window: int = 1000
    """float16: good steps in a row after which the scale is doubled."""
    micro_batches: int = 1
    """Compute the batch in this many parts, exactly: features first, then gradients (arXiv 2101.06983)."""
    activation_checkpointing: Literal["none", "block", "selective"] | bool = "none"
    """Recompute in the backward pass, instead of keeping it: each block ("block", true), or what of it is not the
    result of a matrix product or of attention ("selective")."""
    compile: bool = False
    """Compile each block with torch.compile, for shapes that do not change; the first steps take minutes."""
    cuda_graph: bool = False
    """Launch each step as one CUDA graph, on one GPU: for models and batches so small that launching is what takes
    the time."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to PyTorch."""
    parallel: Literal["ddp", "fsdp", "fsdp2"] = "ddp"
    """Of several processes: the whole model in each; sharded (ZeRO-3); sharded, but whole until backward (ZeRO-2)."""
    shard: int = 0
    """fsdp, fsdp2: processes, next to each other, that share one copy of the model (those of a server); 0: all."""
    timeout: float = 10.0
    """Minutes that a process waits for the others before the run ends with an error."""

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of matrix products, None where it is float32."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision.removeprefix("amp_"))

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes some of the forward pass again."""
        return self.activation_checkpointing not in ("none", False)

    @property
    def autocasts(self) -> bool:
        """Whether weights are float32 all the same."""
        return self.precision.startswith("amp_")


@dataclass(frozen=True, kw_only=True)
class Run:
    output: str = "runs"
    """Folder that receives the run's own folder, named by the recipe."""
    seed: int = 0
    """Seeds weights, data order and token dropping."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM."""
    keep: int = 2
    """Checkpoints kept."""
    async_checkpoints: bool = False
    """Train on while a checkpoint is written, from a copy in the CPU's memory; the next one waits for it."""
    max_skipped: int = 20
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run stops."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too, project "evaclip"; its own variables (WANDB_MODE ...) hold."""
    sample_log: bool = False
    """Write the names of each step's samples to samples-<rank>.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the run, in order; what it does not say is as in `data`."""

    share: float = 0.0
    """Its part of the run's steps (of all shares together)."""
    samples: int = 0
    """Or the samples it sees: all phases say this, or all their share."""
    source: str | None = None
    """As data.source."""
    mixture: tuple[Mixed, ...] | None = None
    """As data.mixture."""
    patch_drop: float | None = None
    """As data.patch_drop."""
    undropped_tail: float | None = None
    """Share of this phase's steps, at its end, that see whole images."""
    kind: Literal["image", "video"] = "image"
    """"video": the features of a sample are the mean of those of its frames."""
    frames: int = 8
    """Frames of a video sample, spread evenly over it."""
    micro_batches: int | None = None
    """As compute.micro_batches: whole images and videos take more memory."""


class Stage(NamedTuple):
    """The steps `first` to `end` - 1 of a run, and what they see."""

    first: int
    end: int
    data: Data  # with what the phase changes
    kind: str
    frames: int  # 1 for images
    micro_batches: int

    @property
    def tail(self) -> int:
        """Steps at the end that see whole images, though patches are dropped before."""
        return round((self.end - self.first) * self.data.undropped_tail) if self.data.patch_drop else 0

    def patch_drop(self, step: int) -> float:
        """The share of patches that a step leaves out."""
        return 0.0 if step >= self.end - self.tail else self.data.patch_drop


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str = "run"
    """Names the run's folder."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loss: Loss = field(default_factory=Loss)
    compute: Compute = field(default_factory=Compute)
    run: Run = field(default_factory=Run)
    phase: tuple[Phase, ...] = ()
    """Stretches of the run with data of their own, [[phase]] in TOML; without any the run is one stretch."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        samples = self.schedule.samples or sum(phase.samples for phase in self.phase)
        return self.schedule.steps or math.ceil(samples / self.data.batch_size) or DEFAULT_STEPS

    def stages(self) -> tuple[Stage, ...]:
        """The phases with their steps, in order; they cover every step of the run."""
        phases = self.phase or (Phase(share=1.0),)
        weights = [phase.share or phase.samples for phase in phases]
        ends = [round(self.steps * total / sum(weights)) for total in accumulate(weights)]
        return tuple(
            Stage(
                first,
                end,
                self._data(phase),
                phase.kind,
                phase.frames if phase.kind == "video" else 1,
                self.compute.micro_batches if phase.micro_batches is None else phase.micro_batches,
            )
            for first, end, phase in zip([0, *ends], ends, phases, strict=False)
        )

    @property
    def digits(self) -> bool:
        """Whether it trains on the digits from beginning to end."""
        return all(stage.data.source == "digits" and not stage.data.mixture for stage in self.stages())

    def _data(self, phase: Phase) -> Data:
        changes = {key: value for key in _OF_DATA if (value := getattr(phase, key)) is not None}
        if "source" in changes or self.data.source != Data.source:
            changes.setdefault("mixture", ())
        return dataclasses.replace(self.data, **changes)

    def __post_init__(self):
        """Raise RecipeError for values that no run could have; before anything is built."""
        data, schedule, optimizer, compute, run = self.data, self.schedule, self.optimizer, self.compute, self.run
        fixed, crop = self.loss.fixed_logit_scale, data.crop_scale
        divided = {compute.micro_batches, *(phase.micro_batches or 1 for phase in self.phase)}
        for ok, key, given, allowed in (
            (bool(self.name) and "/" not in self.name, "name", self.name, "a folder name"),
            (data.batch_size >= 2, "data.batch_size", data.batch_size, "at least 2: a contrast needs two samples"),
            (all(m.weight > 0 for m in data.mixture), "data.mixture", data.mixture, "weights above 0"),
            (len({m.source for m in data.mixture}) == len(data.mixture), "data.mixture", data.mixture, "each set once"),
            (data.workers >= 0, "data.workers", data.workers, "at least 0"),
            (data.cache_gb >= 0, "data.cache_gb", data.cache_gb, "at least 0"),
            (0 <= data.patch_drop < 1, "data.patch_drop", data.patch_drop, "at least 0 and below 1"),
            (0 <= data.undropped_tail <= 1, "data.undropped_tail", data.undropped_tail, "between 0 and 1"),
            (0 < crop[0] <= crop[1] <= 1, "data.crop_scale", crop, "(from, to) with 0 < from <= to <= 1"),
            (schedule.steps >= 0, "schedule.steps", schedule.steps, "at least 1, or 0"),
            (schedule.samples >= 0, "schedule.samples", schedule.samples, "at least 1, or 0"),
            (schedule.warmup >= 0, "schedule.warmup", schedule.warmup, "at least 0"),
            (
                _divides(compute.micro_batches, data.batch_size),
                "compute.micro_batches",
                compute.micro_batches,
                f"a divisor of data.batch_size = {data.batch_size}",
            ),
            *(
                (getattr(optimizer, key) >= 0, f"optimizer.{key}", getattr(optimizer, key), "at least 0")
                for key in ("logit_scale_lr", "visual_lr", "text_lr", "weight_decay", "clip_grad_norm")
            ),
            *(
                (0 < getattr(optimizer, key) <= 1, f"optimizer.{key}", getattr(optimizer, key), "above 0, at most 1")
                for key in ("visual_layer_decay", "text_layer_decay")
            ),
            (
                isinstance(optimizer.trust, str) or optimizer.trust[1] >= 1,
                "optimizer.trust",
                optimizer.trust,
                "('shard', R) with R at least 1",
            ),
            (0 <= self.loss.label_smoothing < 1, "loss.label_smoothing", self.loss.label_smoothing, "in [0, 1)"),
            (compute.threads >= 0, "compute.threads", compute.threads, "at least 0"),
            (
                not (compute.compile and compute.activation_checkpointing == "selective"),
                "compute.activation_checkpointing",
                "selective",
                "'none' or 'block' with compute.compile, which itself recomputes what is cheap",
            ),
            (
                not compute.cuda_graph or (not compute.recomputes and divided == {1}),
                "compute.cuda_graph",
                True,
                "true where micro_batches is 1, that of phases too, and compute.activation_checkpointing 'none': a "
                "graph does not draw the same random numbers twice",
            ),
            (compute.loss_scale >= 1, "compute.loss_scale", compute.loss_scale, "at least 1"),
            (compute.loss_scale_window >= 1, "compute.loss_scale_window", compute.loss_scale_window, "at least 1"),
            (
                compute.shard == 0 or (compute.shard >= 1 and compute.parallel != "ddp"),
                "compute.shard",
                compute.shard,
                "0, or with compute.parallel 'fsdp' or 'fsdp2' a divisor of the number of processes",
            ),
            (compute.timeout > 0, "compute.timeout", compute.timeout, "above 0"),
            (0 <= run.seed < 2**63, "run.seed", run.seed, "0 to 2^63 - 1"),
            (fixed is None or fixed > 0, "loss.fixed_logit_scale", fixed, "above 0"),
            (self.loss.max_logit_scale >= 1, "loss.max_logit_scale", self.loss.max_logit_scale, "at least 1"),
            *((getattr(run, key) >= 1, f"run.{key}", getattr(run, key), "at least 1") for key in _COUNTS),
        ):
            if not ok:
                raise RecipeError(f"{key} is {given!r}; allowed: {allowed}")
        self._check_phases()

    def _check_phases(self) -> None:
        by_samples = [phase.samples > 0 for phase in self.phase]
        for number, phase in enumerate(self.phase, start=1):
            drop, tail = phase.patch_drop or 0.0, phase.undropped_tail or 0.0
            for ok, key, given, allowed in (
                (phase.share >= 0, "share", phase.share, "above 0"),
                (phase.samples >= 0, "samples", phase.samples, "at least 1"),
                ((phase.share > 0) != (phase.samples > 0), "share", phase.share, "above 0, or else `samples` is"),
                (all(by_samples) or not any(by_samples), "samples", phase.samples, "given by all phases or by none"),
                (0 <= drop < 1, "patch_drop", drop, "at least 0 and below 1"),
                (0 <= tail <= 1, "undropped_tail", tail, "between 0 and 1"),
                (phase.frames >= 1, "frames", phase.frames, "at least 1"),
                (
                    phase.micro_batches is None or _divides(phase.micro_batches, self.data.batch_size),
                    "micro_batches",
                    phase.micro_batches,
                    f"a divisor of data.batch_size = {self.data.batch_size}",
                ),
            ):
                if not ok:
                    raise RecipeError(f"phase {number}: {key} is {given!r}; allowed: {allowed}")
        for number, stage in enumerate(self.stages(), start=1):
            if stage.first == stage.end:
                raise RecipeError(
                    f"phase {number} has none of the {self.steps} steps of the run; give the run more steps, or it more"
                )


DEFAULT_STEPS = 1000
_OF_DATA = ("source", "mixture", "patch_drop", "undropped_tail")
_COUNTS = ("log_every", "save_every", "keep", "max_skipped")


def _divides(count: int, size: int) -> bool:
    return count >= 1 and size % count == 0


def load_recipe(name: str) -> Recipe:
    """The recipe of that name, or the one in that TOML or JSON file.

    Raises:
        RecipeError: no such recipe (the nearest are named), or a key that is unknown or of another type.
    """
    files = recipe_files()
    path = files.get(name, Path(name))
    if not path.is_file():
        if path.is_dir():
            raise RecipeError(f"{name} is a folder, but none of a run: there is no {path / 'recipe.json'}")
        near = get_close_matches(name, files, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        known = f"Known: {', '.join(files)}; or give the path of a TOML file or of a run's folder"
        raise RecipeError(f"no recipe {name!r}, and no file of that name; {hint}{known}")
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as {path.suffix or 'TOML'}: {error}") from error
    try:
        recipe = from_dict(Recipe, values, str(path))
        configure(recipe.model.name, vision=recipe.model.vision, text=recipe.model.text)
    except ValueError as error:
        raise error if str(path) in str(error) else RecipeError(f"{path}: {error}") from None
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write every field as JSON, which `load_recipe` reads back equal."""
    write_text(path, json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")


def from_dict(cls: type, values: dict[str, Any], path: str, prefix: str = "") -> Any:
    """Build a dataclass from parsed TOML or JSON, naming file, key and type of what does not fit."""
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds a {type(values).__name__}; a recipe is a table of fields")
    hints = typing.get_type_hints(cls)
    given = {}
    for key, value in values.items():
        where = f"{path}: {prefix}{key}"
        if key not in hints:
            near = get_close_matches(key, hints, n=2, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; known here: {', '.join(hints)}"
            raise RecipeError(f"{where} is no field of a recipe{hint}")
        given[key] = _convert(hints[key], value, where, prefix + key + ".", path)
    for known in dataclasses.fields(cls):
        if known.default is known.default_factory is dataclasses.MISSING and known.name not in given:
            raise RecipeError(f"{path}: {prefix}{known.name} is missing")
    return cls(**given)


def _convert(hint: Any, value: Any, where: str, prefix: str, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value, path, prefix)
    if origin in (types.UnionType, typing.Union):
        given = [option for option in arguments if option is not types.NoneType]
        if value is not None and len(given) == 1:
            return _convert(given[0], value, where, prefix, path)
        for option in arguments:
            try:
                return _convert(option, value, where, prefix, path)
            except RecipeError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        if arguments[-1] is Ellipsis and isinstance(value, list | tuple):
            return tuple(
                _convert(arguments[0], v, f"{where}[{i}]", f"{prefix[:-1]}[{i}].", path) for i, v in enumerate(value)
            )
        if isinstance(value, list | tuple) and len(value) == len(arguments):
            return tuple(_convert(a, v, where, prefix, path) for a, v in zip(arguments, value, strict=True))
    elif origin is dict:
        if isinstance(value, dict):
            return {key: _convert(arguments[1], v, f"{where}.{key}", prefix, path) for key, v in value.items()}
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    kind = " or ".join(map(repr, arguments)) if origin is Literal else getattr(hint, "__name__", str(hint))
    raise RecipeError(f"{where} is {value!r} ({type(value).__name__}); allowed: {kind}")
