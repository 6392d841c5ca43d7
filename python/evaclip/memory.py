"""What a training step keeps in memory, part by part, as formulas; docs/planning.md derives them.

Bytes throughout. The formulas count what autograd saves in this code base; a test holds them against runs.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from evaclip.models.blocks import Checkpointing
from evaclip.models.clip import CLIP
from evaclip.models.config import ClipConfig, TextConfig, VisionConfig

Precision = Literal["fp32", "amp_bf16", "amp_fp16", "bf16", "fp16"]

ALIGNMENT = 8  # elements to which SwiGLU's width is padded for its matrix products
STATISTIC = 4  # bytes of a norm's mean or 1/std, and of attention's log-sum-exp
TILE, LINE = 1024, 64  # of the contrastive loss: side of a tile, ranks in one line


class Widths(NamedTuple):
    """Bytes per element."""

    weight: int
    stream: int  # the residual stream
    activation: int
    master: int  # 0: the weights are their own masters


WIDTHS = {"fp32": Widths(4, 4, 4, 0), "amp_bf16": Widths(4, 4, 2, 0), "bf16": Widths(2, 2, 2, 4)}
WIDTHS |= {key.replace("bf16", "fp16"): widths for key, widths in WIDTHS.items()}


@dataclass(frozen=True)
class Step:
    """What one process computes at once: so many samples (of `frames` images each) of a precision."""

    batch: int
    precision: Precision = "fp32"
    patch_drop: float = 0.0
    frames: int = 1
    gathered: bool = False  # weights, and so the stream, come in half precision from a sharded store: nothing to cast

    @property
    def widths(self) -> Widths:
        """Bytes per element."""
        widths = WIDTHS[self.precision]
        return widths._replace(stream=widths.activation) if self.gathered else widths

    @property
    def casts(self) -> bool:
        """Whether autocast keeps narrow copies of the weights for the backward pass."""
        return self.precision.startswith("amp_") and not self.gathered

    @property
    def images(self) -> int:
        """Images encoded."""
        return self.batch * self.frames

    def tokens(self, config: VisionConfig) -> int:
        """Tokens of one image, the class token counted."""
        return config.tokens(self.patch_drop)


def vision_block(config: VisionConfig, step: Step) -> int:
    """What one block of the vision tower saves for the backward pass."""
    stream, a = step.widths.stream, step.widths.activation
    tokens, width = step.images * step.tokens(config), config.width
    norms = 1 if config.norm == "rms" else 2  # statistics of a norm
    attention = 4 * a * width  # q, k, v and the output, which the projection reads
    inner = (a * width + 2 * STATISTIC) * config.inner_norm
    if config.post_norm:
        residual = 2 * a * width + 2 * a * width  # the inputs of both branches, and the branches that are normalised
    else:
        residual = 2 * stream * width + 2 * a * width  # the stream at both norms, and what they give to the branches
        residual += 2 * a * width * (config.layer_scale is not None)
    hidden = 2 * a * config.mlp_width
    if config.mlp == "swiglu":
        hidden = 3 * a * _padded(config.mlp_width) + 2 * STATISTIC * config.ffn_norm
    per_token = attention + inner + residual + hidden + 2 * norms * STATISTIC + STATISTIC * config.heads
    return tokens * per_token + assembled(config, step)


def assembled(config: VisionConfig, step: Step) -> int:
    """Weights that a block of the vision tower puts together for its matrix products, or that autocast casts."""
    width, hidden, a = config.width, config.mlp_width, step.widths.activation
    cast = step.casts
    total = a * width * width * cast  # the projection
    total += a * 3 * width * width * (cast or not config.qkv_fused)
    if config.mlp == "swiglu":
        padded = _padded(hidden)
        return total + a * 2 * padded * width + a * padded * width * (cast or padded != hidden)
    return total + a * 2 * hidden * width * cast


def text_block(config: TextConfig, step: Step) -> int:
    """What one block of the text tower saves for the backward pass."""
    stream, a = step.widths.stream, step.widths.activation
    width, cast = config.width, step.casts
    per_token = 4 * a * width + 2 * stream * width + 2 * a * width + 2 * a * config.mlp_width
    per_token += 4 * STATISTIC + STATISTIC * config.heads
    weights = a * (4 * width * width + 2 * config.mlp_width * width) * cast
    return step.batch * config.context * per_token + weights


def left(config: VisionConfig | TextConfig, step: Step, tokens: int, checkpointing: Checkpointing) -> int:
    """What checkpointing keeps of one block: its input; with "selective" the results of products and attention, too."""
    width, a = config.width, step.widths.activation
    kept = tokens * step.widths.stream * width
    if checkpointing == "selective":
        swiglu = isinstance(config, VisionConfig) and config.mlp == "swiglu"
        hidden = 2 * _padded(config.mlp_width) if swiglu else config.mlp_width
        # q, k, v, attention, its projection; the hidden layer, the branch
        kept += tokens * (a * (6 * width + hidden) + STATISTIC * config.heads)
    return kept


def activations(config: ClipConfig, step: Step, *, checkpointing: Checkpointing) -> int:
    """What the forward pass keeps; with checkpointing, what is left of all blocks and all that one of them saves."""
    vision, text, a, stream = config.vision, config.text, step.widths.activation, step.widths.stream
    tokens = step.images * step.tokens(vision), step.batch * text.context
    if checkpointing == "none":
        kept = vision.layers * vision_block(vision, step) + text.layers * text_block(text, step)
    else:
        kept = recomputed(config, step, checkpointing)
        kept += vision.layers * left(vision, step, tokens[0], checkpointing)
        kept += text.layers * left(text, step, tokens[1], checkpointing)
    if checkpointing != "none" or vision.post_norm:  # the class token's norm reads, and keeps, the last block's output
        kept += stream * tokens[0] * vision.width
    patch = vision.channels * vision.patch**2
    patches = a * (tokens[0] - step.images) * patch
    if step.casts:
        kept += a * (vision.width + text.width) * config.embed_dim
    ids = 8 * tokens[1]
    ends = (step.images * vision.width + step.batch * text.width) * (stream + a)  # the last norms, of one token each
    features = (step.images + step.batch) * config.embed_dim * (a + 4)
    return kept + patches + ids + ends + features


def recomputed(config: ClipConfig, step: Step, checkpointing: Checkpointing = "block") -> int:
    """What one block saves when it is computed again, beyond what is there already."""
    vision, text = config.vision, config.text
    return max(
        vision_block(vision, step) - left(vision, step, step.images * step.tokens(vision), checkpointing),
        text_block(text, step) - left(text, step, step.batch * text.context, checkpointing),
    )


def workspace(config: ClipConfig, step: Step) -> int:
    """What a block's backward pass has under way: the gradients of the stream, of its hidden layer, and of a branch."""
    vision, text, a, stream = config.vision, config.text, step.widths.activation, step.widths.stream
    hidden = 2 * _padded(vision.mlp_width) if vision.mlp == "swiglu" else vision.mlp_width
    return max(
        step.images * step.tokens(vision) * (stream * vision.width + a * (hidden + vision.width)),
        step.batch * text.context * (stream * text.width + a * (text.mlp_width + text.width)),
    )


def loss(config: ClipConfig, batch: int, ranks: int = 1) -> int:
    """The contrastive loss of `batch` samples on each of so many ranks; the formulas of docs/contrastive.md."""
    width, everywhere = config.embed_dim, batch * ranks
    tiles = 4 * TILE**2 * 2 + 20 * TILE * width
    if ranks == 1:
        return 8 * batch * width + (tiles if batch > TILE else 4 * 4 * batch**2) + 32 * 2 * batch
    lines = ranks if ranks <= LINE else ranks // max(d for d in range(1, math.isqrt(ranks) + 1) if ranks % d == 0)
    rows, columns = everywhere // lines * (lines < ranks) or batch, everywhere * lines // ranks
    gathered = 4 * (columns + rows * (lines < ranks)) * width
    gradients = 4 * (rows + batch) * width + 8 * lines * min(TILE, batch) * width
    return gathered + gradients + tiles + 32 * (rows + columns)


class State(NamedTuple):
    """What a model holds between steps; all of it, before it is sharded."""

    weights: int
    gradients: int
    masters: int
    moments: int
    buffers: int


def state(model: CLIP) -> State:
    """Weights, gradients and what FusedLAMB keeps for them; `model` may be on the meta device."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    masters = sum(4 * p.numel() for p in parameters if p.element_size() == 2)
    moments = sum(4 + 2 * 4 * p.numel() for p in parameters)  # and the number of the step
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return State(weights, sum(p.numel() * p.element_size() for p in parameters), masters, moments, buffers)


def _padded(width: int) -> int:
    return math.ceil(width / ALIGNMENT) * ALIGNMENT
