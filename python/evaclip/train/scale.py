"""A recipe shrunk until a CPU runs it in seconds, through the same code and all its phases."""

from dataclasses import replace
from typing import Any

from evaclip.data.digits import Digits
from evaclip.train.recipe import Override, Recipe

BATCH, LAYERS, HEADS, WIDTH = 16, 2, 2, 64
STEPS = 4  # of each phase


def tiny(recipe: Recipe) -> Recipe:
    """The recipe for a model of two layers on handwritten digits, four steps a phase, on a CPU.

    What the recipe is about stays: the variant of the blocks; the optimizer with its rates, decays and trust ratios;
    precision, loss, checkpointing; and of each phase kind, drop and order. Data sets become digits (a video: a number,
    written once per frame), starting weights random ones.
    """
    digits = Digits(BATCH)
    tokenizer = digits.tokenizer()
    tower: dict[str, Override] = {"layers": LAYERS, "heads": HEADS, "width": WIDTH}
    vision = tower | {"image_size": digits.image_size, "patch": 4, "channels": 1}
    text = tower | {"context": tokenizer.context, "vocabulary": tokenizer.vocabulary_size}
    phases = tuple(
        replace(phase, share=1.0, samples=0, source=None, mixture=None, micro_batches=_few(phase.micro_batches))
        for phase in recipe.phase
    )
    steps = STEPS * max(1, len(phases))
    words = "words:" + " ".join(tokenizer.words)
    return replace(
        recipe,
        name=f"{recipe.name}-tiny",
        model=replace(
            recipe.model,
            vision=recipe.model.vision | vision,
            text=recipe.model.text | text,
            checkpoint=None,
            image_checkpoint=None,
            text_checkpoint=None,
        ),
        data=replace(recipe.data, source="digits", mixture=(), batch_size=BATCH, tokenizer=words),
        schedule=replace(recipe.schedule, steps=steps, samples=0, warmup=min(2, recipe.schedule.warmup)),
        compute=replace(recipe.compute, device="cpu", threads=1, micro_batches=_few(recipe.compute.micro_batches)),
        run=replace(recipe.run, log_every=1, save_every=STEPS, tensorboard=False),
        phase=phases,
    )


def _few(micro_batches: Any) -> Any:  # None stays
    return micro_batches and min(2, micro_batches)
