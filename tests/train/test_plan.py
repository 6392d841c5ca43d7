"""The memory model against what small models really hold; the estimate of the published run."""

import dataclasses
import itertools

import distributed
import pytest
import torch
from train import ranked
from train.ranked import saved_bytes

import evakernels as ek
from evaclip import flops, memory
from evaclip.cli import main
from evaclip.gpus import GPUS, gpu_of
from evaclip.models import configure, create_model
from evaclip.models.config import HEAD_DIMS
from evaclip.plan import Job, Planning, Way, best, estimate, jobs, options, parts, planned, report, total
from evaclip.train.recipe import Data, Model, Recipe, RecipeError, Schedule, load_recipe
from evakernels.ops import attention
from evakernels.ops.contrastive import ranks, reference

BATCH = 16
MODELS = ["EVA01-CLIP-tiny", "EVA01-CLIP-tiny-layerscale", "EVA02-CLIP-tiny", "EVA-CLIP-tiny", "EVA-CLIP-tiny-postnorm"]
each_model = pytest.mark.parametrize("name", MODELS)
each_precision = pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])  # float16 is as wide as bfloat16


def model_of(name, precision, **vision):
    torch.manual_seed(0)
    model = create_model(name, dtype=torch.bfloat16 if precision == "bf16" else None, vision=vision)
    if "layerscale" in name and precision != "fp32":
        pytest.skip("one precision tells what a layer scale keeps")
    return model.train()


def batch_of(model, drop):
    torch.manual_seed(1)
    vision, text = model.config.vision, model.config.text
    images = torch.randn(BATCH, vision.channels, *vision.image)
    kept = ek.sample_kept_tokens(BATCH, vision.patches, vision.tokens(drop) - 1, seed=0) if drop else None
    return images, torch.randint(1, text.vocabulary, (BATCH, text.context)), kept


def forward(model, precision, images, ids, kept):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"):
        return model(images, ids, kept=kept)


@each_model
@each_precision
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_activations_are_those_of_the_formula(name, precision, drop):
    model = model_of(name, precision)
    actual, _ = saved_bytes(model, lambda: forward(model, precision, *batch_of(model, drop)))
    formula = memory.activations(model.config, memory.Step(BATCH, precision, drop), checkpointing="none")
    assert formula == pytest.approx(actual, rel=0.015)


@each_precision
def test_activations_of_a_sharded_model_are_those_of_the_formula(precision, tmp_path):
    changes = {"compute__parallel": "fsdp", "compute__precision": precision}
    config = configure("EVA02-CLIP-tiny-digits", vision={"layers": 1}, text={"layers": 1})
    formula = memory.activations(config, memory.Step(8, precision, gathered=True), checkpointing="none")
    for actual in distributed.run(ranked.saved, 2, str(tmp_path), changes):
        assert formula == pytest.approx(actual, rel=0.015)


@each_model
@each_precision
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_with_checkpointing_they_are_inputs_and_one_block(name, precision, drop):
    model = model_of(name, precision)
    model.set_checkpointing()
    config, step = model.config, memory.Step(BATCH, precision, drop)
    actual, _ = saved_bytes(model, lambda: forward(model, precision, *batch_of(model, drop)))
    block = memory.recomputed(config, step)
    assert memory.activations(config, step, checkpointing="block") - block == pytest.approx(actual, rel=0.05)

    from evaclip.models.blocks import Stream

    kept = batch_of(model, drop)[2]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    stream = torch.randn(BATCH, step.tokens(config.vision), config.vision.width, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "amp_bf16"):
        in_block, _ = saved_bytes(model, lambda: model.visual.blocks[1](Stream(stream), kept).sum())
    in_block -= kept.nbytes if drop and config.vision.rope else 0
    assert memory.vision_block(config.vision, step) == pytest.approx(in_block, rel=0.05)


@each_model
@each_precision
def test_weights_gradients_and_optimizer_state_are_exact(name, precision):
    model = model_of(name, precision)
    image, text, scale = forward(model, precision, *batch_of(model, 0.0))
    ek.contrastive_loss(image, text, scale)[0].backward()
    optimizer = ek.FusedLAMB(model.parameters(), lr=1e-3)
    optimizer.step()
    states = [state for state in optimizer.state.values()]
    held = memory.state(model)
    assert held.weights == sum(p.nbytes for p in model.parameters())
    assert held.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert held.masters == sum(s["master"].nbytes for s in states if "master" in s)
    assert held.moments == sum(x.nbytes for s in states for key, x in s.items() if key != "master")
    assert held.buffers == sum(b.nbytes for b in model.buffers())
    assert memory.state(model.to("meta")) == held


def changes(function):
    """The bytes that tensors made inside hold, after each of them; and what the function returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    found = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return list(itertools.accumulate(n for _, n in found)), result


def peak(function):
    """The most bytes that tensors made inside hold at once."""
    return max(changes(function)[0])


@each_model
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_selective_checkpointing_keeps_products_and_attention_too(name, precision):
    model = model_of(name, precision)
    model.set_checkpointing("selective")
    step = memory.Step(BATCH, precision, 0.5)
    batch = batch_of(model, 0.5)
    held, _ = changes(lambda: forward(model, precision, *batch))
    formula = memory.activations(model.config, step, checkpointing="selective")
    assert formula - memory.recomputed(model.config, step, "selective") == pytest.approx(held[-1], rel=0.05)


@pytest.mark.parametrize("name", ["EVA01-CLIP-tiny", "EVA02-CLIP-tiny", "EVA-CLIP-tiny-postnorm"])
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_a_step_never_takes_more_than_the_plan_says(name, checkpointing):
    """In float32: in half precision some CPU kernels widen their operands, which GPU kernels do not."""
    model = model_of(name, "fp32", layers=4)
    model.set_checkpointing(checkpointing)
    images, ids, _ = batch_of(model, 0.0)

    def step():
        image, text, scale = model(images, ids)
        ek.contrastive_loss(image, text, scale)[0].backward()

    step()  # what is made once is not the step's
    model.zero_grad(set_to_none=True)
    job = Job(model, "fp32", BATCH, GPUS["h100"], 1)
    found = parts(job, Way("ddp", checkpointing))
    most = sum(found[part] for part in ("activations", "workspace", "gradients", "loss"))
    assert most - found["gradients"] - found["workspace"] - found["loss"] < peak(step) <= most


@pytest.mark.parametrize(("batch", "width"), [(256, 512), (1024, 64), (2048, 64)])
def test_the_loss_takes_no_more_than_its_formula(batch, width):
    config = dataclasses.replace(configure("EVA02-CLIP-tiny"), embed_dim=width)
    image, text = (torch.randn(batch, width, requires_grad=True) for _ in range(2))
    formula = memory.loss(config, batch)
    assert 0.5 * formula <= peak(lambda: ek.contrastive_loss(image, text, 10.0)) <= formula


def test_the_loss_of_many_ranks_is_linear_in_the_batch():
    config = configure("EVA-CLIP-18B")
    line, b, ranks, width = memory.loss(config, 300, 64), 300, 64, 1536
    features, gradients, chunks = 4 * b * ranks * width, 8 * b * width, 8 * ranks * b * width
    assert line == features + gradients + chunks + 8 * 1024**2 + 20 * 1024 * width + 32 * (b * ranks + b)
    assert memory.loss(config, 300, 360) < 2 * line  # a grid: not 360 / 64 times as much


def test_what_the_formulas_take_from_the_kernels_is_theirs():
    assert memory.ALIGNMENT == ek.nn.ALIGNMENT and HEAD_DIMS == attention.HEAD_DIMS
    assert (memory.TILE, memory.LINE) == (reference.TILE, ranks.LINE)


def test_flop_are_those_of_open_clips_profile():
    for name, image, text in (  # GFLOP of its docs/model_profile.csv
        ("EVA02-CLIP-B-16", 35.1, 6.0),
        ("EVA02-CLIP-L-14", 162.0, 13.3),
        ("EVA02-CLIP-L-14-336", 381.9, 13.3),
        ("EVA01-CLIP-g-14", 534, 13.3),
        ("EVA02-CLIP-bigE-14-plus", 2264, 97.9),
    ):
        config = configure(name)
        assert flops.vision_forward(config.vision, config.embed_dim, config.vision.tokens()) / 1e9 == pytest.approx(
            image, rel=2e-3
        )
        assert flops.text_forward(config.text, config.embed_dim) / 1e9 == pytest.approx(text, abs=0.05)


def job(name="EVA-CLIP-18B", gpus=360, batch=108000, precision="bf16", drop=0.5, gpu="a100-40g"):
    return Job(create_model(name, device="meta", dtype=torch.bfloat16), precision, batch, GPUS[gpu], gpus, drop)


def test_sharding_divides_what_it_says():
    large = job()
    held = memory.state(large.model)
    of = {sharding: parts(large, Way(sharding, "block")) for sharding in ("ddp", "zero1", "zero2", "zero3")}
    assert of["ddp"]["weights"] == held.weights == 2 * 18_325_482_240 + 4
    assert of["ddp"]["moments"] == held.moments > 8 * 18_325_482_241
    assert of["zero1"]["moments"] == held.moments / 360
    assert of["zero1"]["masters"] == held.masters / 360 == 4 * 18_325_482_240 / 360
    assert of["zero1"]["gradients"] == held.gradients
    assert held.gradients / 360 < of["zero2"]["gradients"] < held.gradients / 10
    assert of["zero2"]["gathered"] == held.weights
    assert of["zero3"]["gathered"] < held.weights / 20
    assert of["zero3"]["weights"] == held.weights / 360
    for part in ("activations", "workspace", "loss", "input"):
        assert len({found[part] for found in of.values()}) == 1


def test_the_published_18b_run():
    """The hours of the run give its MFU; ours is estimated to need less than twice, and more than half, of them."""
    work, seconds = total(jobs(load_recipe("EVA-CLIP-18B"), GPUS["a100-40g"], 360))
    half = 6e9 * flops.training(configure("EVA-CLIP-18B"), 129)
    available = 360 * 312e12 * 600 * 3600
    assert half / available == pytest.approx(0.34, abs=0.01)  # were patches dropped to the end
    assert work / available == pytest.approx(0.393, abs=0.001)
    assert 300 < seconds / 3600 < 600
    chosen = best(job())
    assert chosen.way == Way("zero3", "block", 1)
    assert chosen.memory < 40e9
    assert estimate(job(), Way("ddp", "block")).parts["weights"] > 36e9


def test_time_is_work_over_rate():
    one, two = (estimate(job(gpus=n, batch=300 * n), Way("zero3", "block")) for n in (64, 128))
    assert two.computing == pytest.approx(one.computing, rel=0.02)  # each GPU has as much to do, but for the loss
    forward = flops.forward(configure("EVA-CLIP-18B"), 129)
    assert one.computing == pytest.approx(300 * 4 * forward / 312e12 / 0.7, rel=0.01)
    more = estimate(job(gpus=64, batch=300 * 64), Way("zero3", "block", 2))
    assert more.computing > one.computing and more.parts["activations"] < one.parts["activations"]
    assert one.mfu == pytest.approx(job(gpus=64, batch=300 * 64).flops / (64 * 312e12) / one.seconds)
    alone = estimate(job("EVA02-CLIP-B-16", 1, 64), Way("ddp", "none"))
    assert alone.communicating == 0


def test_the_best_way_shards_and_recomputes_only_where_it_must():
    small = best(job("EVA02-CLIP-B-16", 8, 1024)).way
    assert (small.checkpointing, small.micro_batches) == ("none", 1)
    assert small.sharding != "zero3"  # nothing forces it
    assert best(job("EVA-CLIP-8B", 8, 1024, gpu="h100")).way.sharding in ("zero2", "zero3")
    assert best(job("EVA-CLIP-18B", 1, 1024)) is None
    for one in options(job("EVA02-CLIP-L-14", 8, 8 * 1000)):
        assert 1000 % one.way.micro_batches == 0


def test_a_plan_names_its_parts_and_the_published_run(capsys):
    told = ["--gpus", "360", "--gpu", "a100-40g", "--batch", "108000", "--mfu", "0.4"]
    assert main(["plan", "EVA-CLIP-18B", *told]) == 0
    output = capsys.readouterr().out
    for expected in (
        "18,325,482,241 parameters",
        "300 each, 129 of 257 tokens",
        "best: ZeRO-3 / FSDP, with activation checkpointing",
        *("moments", "activations", "loss"),
        "8 frames of 129 of 257 tokens",
        "at an MFU of 40 %",
        "published   600 hours, MFU 39.3 %",
        "estimated",
    ):
        assert expected in output, expected


def test_a_plan_of_a_model_without_a_recipe(capsys):
    assert main(["plan", "EVA02-CLIP-tiny", "--gpus", "2", "--batch", "64"]) == 0
    assert "best: " in capsys.readouterr().out
    assert "nothing fits" in report(
        planned(Recipe(model=Model(name="EVA-CLIP-18B")), Planning(batch=8, patch_drop=0.5)), "a100-40g", 1
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan"], "which model?"),
        (["plan", "EVA02-CLIP-B16"], "EVA02-CLIP-B-16"),
        (["plan", "EVA02-CLIP-B-16", "--gpu", "a1000"], "known: a100-40g"),
        (["plan", "EVA02-CLIP-B-16", "--gpus", "7"], "cannot be divided among 7 GPUs"),
        (["plan", "EVA02-CLIP-B-16", "--gpus", "0"], "--gpus is 0; at least 1"),
        (["plan", "EVA02-CLIP-B-16", "--mfu", "0"], "--mfu is 0.0; above 0"),
        (["plan", "EVA02-CLIP-B-16", "--mfu", "34"], "--mfu is 34.0; above 0, at most 1"),
        (["plan", "EVA02-CLIP-B-16", "--patch-drop", "1.5"], "patch_drop is 1.5"),
        (["plot"], "which runs?"),
        (["plot", "nowhere"], "nowhere has no metrics.jsonl"),
    ],
)
def test_what_cannot_be_planned_or_drawn_is_said(arguments, sentence, capsys):
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_options_replace_what_the_recipe_says():
    recipe = load_recipe("EVA-CLIP-18B")
    changed = planned(recipe, Planning(patch_drop=0.0))
    assert (changed.steps, changed.phase) == (recipe.steps, ())
    assert planned(recipe, Planning(samples=1_080_000)).steps == 10
    tail = Recipe(data=Data(batch_size=8, patch_drop=0.5, undropped_tail=0.25), schedule=Schedule(steps=8))
    assert [(stage.patch_drop, steps) for stage, steps in jobs(tail, GPUS["h100"], 2)] == [(0.5, 6), (0.0, 2)]
    with pytest.raises(RecipeError, match="batch_size is 1"):
        planned(recipe, Planning(batch=1))


def test_a_gpu_is_known_by_what_its_driver_calls_it():
    assert gpu_of("NVIDIA A100-SXM4-40GB") is GPUS["a100-40g"]
    assert gpu_of("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_of("NVIDIA GeForce RTX 4090") is None


@pytest.mark.parametrize(
    ("name", "gpus", "gpu"),
    [
        ("EVA01-CLIP-g-14", 256, "a100-40g"),
        ("EVA01-CLIP-g-14-plus", 112, "a100-40g"),
        ("EVA02-CLIP-B-16", 64, "a100-40g"),
        ("EVA02-CLIP-L-14", 128, "a100-40g"),
        ("EVA02-CLIP-L-14-336", 128, "a100-40g"),
        ("EVA02-CLIP-bigE-14", 144, "a100-80g"),
        ("EVA02-CLIP-bigE-14-plus", 144, "a100-80g"),
        ("EVA-CLIP-8B", 384, "a100-40g"),
        ("EVA-CLIP-8B-448", 384, "a100-40g"),
        ("EVA-CLIP-18B", 360, "a100-40g"),
        ("EVA-CLIP-18B-336", 360, "a100-40g"),
    ],
)
def test_a_recipe_fits_the_gpus_of_its_batch(name, gpus, gpu):
    """In the micro-batches of each of its phases, and in no fewer."""
    recipe = load_recipe(name)
    sharding = {"ddp": "ddp", "fsdp2": "zero2", "fsdp": "zero3"}[recipe.compute.parallel]
    found = jobs(recipe, GPUS[gpu], gpus)
    for (job, _), stage in zip(found, recipe.stages(), strict=True):
        divisors = [n for n in range(1, stage.micro_batches + 1) if job.batch // gpus % n == 0]
        fits = [estimate(job, Way(sharding, "block", n)).fits for n in divisors]
        assert fits[-1] and not any(fits[:-1])
