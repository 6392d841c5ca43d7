"""The command line: evaclip train | eval | convert | export | data | plot | plan | models."""

import atexit
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from evaclip.data.check import Check, check
from evaclip.data.common import DataError, extra
from evaclip.data.digits import Digits
from evaclip.data.pack import Pack, pack
from evaclip.device import pick_device
from evaclip.evaluate import TEMPLATES, load_templates, print_results, write_json
from evaclip.evaluate.datasets import evaluate_digits, evaluate_images
from evaclip.models import configure, create_model, list_models
from evaclip.plan import Planning, planned, report
from evaclip.plot import draw
from evaclip.recipes import recipe_files
from evaclip.run import load
from evaclip.train import checkpoint
from evaclip.train.ranks import RankError, join, leave
from evaclip.train.recipe import Model, Recipe, RecipeError, load_recipe
from evaclip.train.resolved import resolved
from evaclip.train.restart import began, mark
from evaclip.train.scale import tiny
from evaclip.train.showcase import show_digits
from evaclip.train.trainer import Trainer
from evaclip.weights.convert import SHARD_SIZE, Dialect, convert
from evaclip.weights.export import OPEN_CLIP, export, exported
from evaclip.weights.load import Part
from evaclip.weights.resize import Resize

USAGE = """evaclip: train and evaluate EVA-CLIP models

  evaclip train RECIPE [--help | --FIELD VALUE ...]   RECIPE: a name, a TOML file, or a run's folder to continue it
                       [--print] [--scale tiny]       show what the recipe comes to; run it shrunk, on a CPU in seconds
  evaclip eval RUN [--data PATH] [--help]             zero-shot classification and retrieval of a trained model
  evaclip convert SOURCE FILE [--to timm] [--help]    weights of any origin as native, timm, open_clip or hf
  evaclip export SOURCE FOLDER [--help]               a folder to publish: weights, configuration, model card
  evaclip data pack SOURCE FOLDER [--help]            images with captions (folder, CSV/TSV/JSONL, Parquet) into shards
  evaclip data check SHARDS [--help]                  what is in shards, and what of it is broken
  evaclip plot RUN...  [--output PICTURE]             draw runs from their metrics.jsonl
  evaclip plan MODEL   --gpus N --gpu a100-40g ...    memory, time and sharding of a run on GPUs, by formula
  evaclip models                                      the models, with their sizes

recipes: {recipes}"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors that a user can mend are printed as one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {
        "train": train,
        "eval": evaluate,
        "convert": convert_weights,
        "export": export_folder,
        "data": data,
        "plot": plot,
        "plan": plan,
        "models": models,
    }
    if not arguments or arguments[0] not in commands:
        print(USAGE.format(recipes=", ".join(recipe_files())))
        asked_for_help = not arguments or arguments[0] in ("-h", "--help", "help")
        if not asked_for_help:
            print(f"\nevaclip: no command {arguments[0]!r}", file=sys.stderr)
        return 0 if asked_for_help else 2
    try:
        code = commands[arguments[0]](arguments[1:])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has left; nor can what is buffered be written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, DataError, checkpoint.CheckpointError, RankError) as error:
        print(f"evaclip {arguments[0]}: {error}", file=sys.stderr)
        return 2


def command() -> NoReturn:
    """What the shell calls: `main`, and the end of the process."""
    code = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # A thread of gloo's that lets its last tensor go while the interpreter is taken down aborts the process
        # (github.com/pytorch/pytorch/pull/179291): a run that has finished would seem to have failed.
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def train(arguments: list[str]) -> int:
    name, rest = _named(arguments)
    show, scale, rest = _flags(rest)
    run = Path(name) if name and name not in recipe_files() and (Path(name) / "recipe.json").is_file() else None
    if run and exported(run):
        raise RecipeError(
            f"{run} was written by `evaclip export` and is no run; start one from it: evaclip train RECIPE "
            f"--model.checkpoint {run}"
        )
    if run and checkpoint.is_checkpoint(run):
        raise RecipeError(
            f"{run} is one checkpoint; `evaclip train {run.parent.parent}` continues its run from the newest one, so "
            "move newer ones away to continue from this"
        )
    recipe = load_recipe(str(run / "recipe.json") if run else name) if name else Recipe()
    if scale:
        recipe = tiny(recipe)
    before, recipe = recipe, _parse(Recipe, f"evaclip train {name or 'RECIPE'}", rest, recipe)
    if run and (recipe.name, recipe.run.output) != (before.name, before.run.output):
        raise RecipeError(f"{run} is continued where it is; leave out --name and --run.output")
    if any(argument.split("=")[0] == "--data.source" for argument in rest):  # also where it is the default
        recipe = replace(recipe, data=replace(recipe.data, mixture=()))
    if not name:
        raise RecipeError(f"which recipe? Known: {', '.join(recipe_files())}; or a TOML file, or a run's folder")
    if show:
        print(resolved(recipe), end="")
        return 0
    if not run:
        run = began(recipe, *join(recipe.compute.device, recipe.compute.timeout))
    resume = run is not None and bool(checkpoint.checkpoints(run))
    trainer = Trainer(recipe, run or Path(recipe.run.output) / recipe.name, resume=resume)
    ranks = trainer.ranks
    if not run:  # now that nothing can be wrong with the recipe any more
        claimed = str(claim_folder(Path(recipe.run.output), recipe.name)) if ranks.first else None
        trainer.folder = Path(ranks.told(claimed) or "")
        if ranks.first:
            mark(trainer.folder)
    folder = trainer.folder
    parameters = sum(p.numel() for p in trainer.model.parameters())
    start = f"continues at step {trainer.step}" if resume else "starts"
    if trainer.step >= recipe.steps:
        start = f"is at step {trainer.step} already, so that none of {recipe.steps:,} steps is left"
    on = f"{ranks.world} x {trainer.device.type}" if ranks.world > 1 else str(trainer.device)
    if ranks.first:
        print(f"{recipe.model.name}, {parameters:,} parameters, on {on}; {folder} {start}", flush=True)
    try:
        outcome = trainer.run()
    finally:
        leave()
    if not ranks.first:
        return 0 if outcome == "finished" else 1
    if trainer.skipped:
        print(f"{trainer.skipped} of {trainer.step} steps were skipped, see {folder / 'metrics.jsonl'}")
    if outcome != "finished":
        print(f"stopped: {outcome}. To continue: evaclip train {folder}")
        return {"SIGINT": 130, "SIGTERM": 143}.get(outcome, 1)
    if scale:
        print(f"trained {trainer.step} steps, phases: {len(trainer.stages)}")
    elif recipe.digits:
        model, tokenizer, _ = load(folder, device=trainer.device)  # whole, and not compiled
        show_digits(model, tokenizer, folder)
    else:
        print(f"trained {trainer.step} steps. Next: evaclip eval {folder} --data FOLDER")
    return 0


def claim_folder(output: Path, name: str) -> Path:
    """Make <output>/<name>, or <name>-2, -3 ... where earlier runs stand: nothing is ever overwritten."""
    for i in count(1):
        folder = output / (name if i == 1 else f"{name}-{i}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def models(arguments: list[str]) -> int:
    for name in list_models():
        model = create_model(name, device="meta")
        towers = (sum(p.numel() for p in tower.parameters()) for tower in (model.visual, model.text))
        vision, text = model.config.vision, model.config.text
        print(
            "{:26s} {:>15,} + {:>11,} parameters   image {}, {} layers of {}; text {} layers of {}".format(
                name, *towers, vision.image_size, vision.layers, vision.width, text.layers, text.width
            )
        )
    return 0


def plan(arguments: list[str]) -> int:
    name, rest = _named(arguments)
    options = _parse(Planning, f"evaclip plan {name or 'MODEL'}", rest, Planning())
    if not name:
        raise ValueError("which model? `evaclip models` lists them; a recipe's name or TOML file serves as well")
    known = name in recipe_files() or Path(name).is_file()
    recipe = load_recipe(name) if known else Recipe(name="plan", model=Model(name=configure(name).name))
    print(report(planned(recipe, options), options.gpu, options.gpus, options.mfu), end="")
    return 0


@dataclass(frozen=True, kw_only=True)
class Plotting:
    """What `evaclip plot RUN...` can be told."""

    output: Path = Path("runs.png")
    """The picture."""


def plot(arguments: list[str]) -> int:
    runs = list(takewhile(lambda argument: argument[:1] != "-", arguments))
    options = _parse(Plotting, "evaclip plot RUN...", arguments[len(runs) :], Plotting())
    print(f"written to {draw([Path(run) for run in runs], options.output)}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaclip eval RUN` can be told."""

    data: str = "digits"
    """"digits"; a folder with one subfolder of images per class; or images with captions (folder or CSV/TSV/JSONL)."""
    task: Literal["auto", "classification", "retrieval"] = "auto"
    """"auto": retrieval where there are captions, else classification."""
    templates: Path | None = None
    """Prompt templates for classification, one per line, with {} for the class name."""
    resize: Literal["crop", "squash"] = "crop"
    """Short side and centre crop, or both sides to the model's size."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda", "cuda:1"."""
    batch_size: int = 64
    """Images encoded at once."""
    output: Path | None = None
    """The JSON file; default: eval-<data>.json in the run's folder."""


def evaluate(arguments: list[str]) -> int:
    name, rest = _named(arguments)
    options = _parse(Evaluation, f"evaclip eval {name or 'RUN'}", rest, Evaluation())
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; at least 1")
    if not name:
        raise ValueError("which run? Give a folder that `evaclip train` wrote, or one of its checkpoints")
    model, tokenizer, preprocess = load(name, device=pick_device(options.device))
    if options.data == "digits":
        if (preprocess.channels, preprocess.size) != (1, Digits(batch_size=1).image_size):
            raise ValueError(
                f"{name} is not for the digits, which are evaluated where --data is not given; give a folder with one "
                "subfolder of images per class, or images with captions"
            )
        results = evaluate_digits(model, tokenizer)
    else:
        results = evaluate_images(
            model,
            tokenizer,
            replace(preprocess, mode=options.resize),
            options.data,
            task=options.task,
            templates=load_templates(options.templates) if options.templates else TEMPLATES,
            batch_size=options.batch_size,
        )
    output = options.output or Path(name) / f"eval-{Path(options.data).stem}.json"
    write_json(results, output)
    for what, values in results.items():
        print_results({metric: {what: value} for metric, value in values.items()})
    print(f"written to {output}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Converting:
    """What `evaclip convert SOURCE FILE` can be told."""

    to: Dialect = "native"
    """Whose keys: "native" (EVA's own), "timm" (the image tower alone), "open_clip", or "hf" (remote code)."""
    model: str | None = None
    """The model that the weights must fit, one of `evaclip models`; of a run it is known."""
    part: Part | None = None
    """"visual" or "text": that tower alone."""
    resize: Resize | None = None
    """Interpolate positions and patch kernels to the model's: "eva" as EVA's code does, "timm" as timm's."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of all weights but logit_scale; default: as they are."""
    shard_size: float = SHARD_SIZE
    """Largest .safetensors file in GB; beyond it several are written, and their index."""


def convert_weights(arguments: list[str]) -> int:
    source, rest = _named(arguments)
    file, rest = _named(rest)
    options = _parse(Converting, f"evaclip convert {source or 'SOURCE'} {file or 'FILE'}", rest, Converting())
    if not source or not file:
        raise ValueError("give the weights (a file, a folder, a run or a name of the hub), then the file to write")
    converted = convert(
        source,
        file,
        to=options.to,
        model=create_model(options.model, device="meta") if options.model else None,
        part=options.part,
        resize=options.resize,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        shard_size=options.shard_size,
    )
    print(f"{converted}; written to {converted.files[-1]}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Exporting:
    """What `evaclip export SOURCE FOLDER` can be told."""

    model: str | None = None
    """The model whose weights they are; default: the run's, or the published one of the same shapes."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of all weights but logit_scale; default: as they are."""


def export_folder(arguments: list[str]) -> int:
    source, rest = _named(arguments)
    folder, rest = _named(rest)
    options = _parse(Exporting, f"evaclip export {source or 'SOURCE'} {folder or 'FOLDER'}", rest, Exporting())
    if not source or not folder:
        raise ValueError("give the weights (a run, a file, a folder or a name of the hub), then the folder to make")
    model = create_model(options.model, device="meta") if options.model else None
    files = export(source, folder, model=model, dtype=getattr(torch, options.dtype) if options.dtype else None)
    print(f"written to {folder}: {', '.join(file.name for file in files)}")
    if not any(file.name == OPEN_CLIP for file in files):
        print("open_clip cannot load it: timm has no such image tower, or the tokenizer is not CLIP's")
    return 0


def data(arguments: list[str]) -> int:
    command, rest = _named(arguments)
    if command not in ("pack", "check"):
        raise ValueError("what about data? `evaclip data pack` makes shards, `evaclip data check` reads them")
    source, rest = _named(rest)
    if command == "check":
        checking = _parse(Check, f"evaclip data check {source or 'SHARDS'}", rest, Check())
        if not source:
            raise ValueError('which shards? Give a folder of .tar files, a pattern like "shards/{000000..000099}.tar"')
        report = check(source, checking)
        if checking.output:
            write_json(vars(report), checking.output)
        return 0 if report.sound else 1
    folder, rest = _named(rest)
    options = _parse(Pack, f"evaclip data pack {source or 'SOURCE'} {folder or 'FOLDER'}", rest, Pack())
    if not source or not folder:
        raise ValueError("give the images (a folder or a CSV, TSV, JSONL or Parquet table), then a folder for shards")
    shards, samples = pack(Path(source), Path(folder), options)
    print(f"{samples} samples in {shards} shards. Next: evaclip data check {folder}")
    return 0


def _named(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The first word, where it is no option, and the rest."""
    return (arguments[0], arguments[1:]) if arguments and arguments[0][:1] != "-" else (None, arguments)


def _flags(arguments: list[str]) -> tuple[bool, bool, list[str]]:
    """Whether --print and --scale tiny are among the arguments of `evaclip train`, and the others."""
    show = "--print" in arguments
    rest = [argument for argument in arguments if argument != "--print"]
    scale = next((i for i, argument in enumerate(rest) if argument.split("=")[0] == "--scale"), None)
    if scale is None:
        return show, False, rest
    joined = "=" in rest[scale]
    given = rest[scale].partition("=")[2] if joined else " ".join(rest[scale + 1 : scale + 2])
    if given != "tiny":
        raise RecipeError(f'--scale is {given!r}; allowed: "tiny"')
    return show, True, rest[:scale] + rest[scale + (1 if joined else 2) :]


def _parse(kind: type, prog: str, arguments: list[str], default: Any) -> Any:
    """A dataclass from its default and the command line; prints help and leaves where that is asked for."""
    tyro = extra("tyro", "tyro", "the command line")
    return tyro.cli(kind, default=default, args=arguments, prog=prog, config=(tyro.conf.FlagConversionOff,))


if __name__ == "__main__":
    command()
