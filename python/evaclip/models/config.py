"""What a model is made of: one frozen dataclass per tower, and the published models as a table of them."""

import math
from dataclasses import dataclass, replace

HEAD_DIMS = range(32, 129, 8)  # what evakernels.attention takes


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision transformer of the EVA family. The published block variants are combinations of these fields."""

    image_size: int | tuple[int, int]  # pixels: the side of a square image, or (height, width)
    patch: int  # side of a square patch, pixels
    channels: int = 3
    layers: int
    width: int  # of the residual stream
    heads: int
    mlp: str = "gelu"  # "gelu": fc2(gelu(fc1 x)); "swiglu": w3(norm(silu(w1 x) * w2 x))
    mlp_ratio: float = 4.0  # as published: the hidden width is int(width * mlp_ratio)
    norm: str = "layer"  # "layer" or "rms"
    eps: float = 1e-6  # of every norm in the tower
    post_norm: bool = False  # x + norm(f(x)) instead of x + f(norm(x))
    qkv_fused: bool = True  # one stored weight q|k|v, or three
    qkv_bias: bool = True  # biases of q and v; k never has one
    inner_norm: bool = False  # a norm between attention and its projection (inner_attn_ln)
    ffn_norm: bool = False  # a norm between SwiGLU and its projection (ffn_ln)
    rope: bool = False  # rotate q and k by patch coordinates, scaled to a grid of 16 patches
    layer_scale: float | None = None  # initial value of a learned scale per channel of each branch; None: no scale
    drop_path: float = 0.0  # stochastic depth: rate of the last block, rising linearly from 0 at the first
    head_bias: bool = True  # of the projection into the joint space
    init_std: float = 0.02  # of the weights, as published; narrow towers want more
    position_init_std: float = 0.02
    head_init_scale: float = 0.001  # the projection starts at this times a normal of std `init_std`

    def __post_init__(self):
        _check_counts(self, "patch", "channels", "layers", "width", "heads")
        for side in self.image:
            _check(side % self.patch == 0, f"image side {side} is not a multiple of patch {self.patch}")
        _check_heads(self.width, self.heads)
        _check(self.mlp in ("gelu", "swiglu"), f"mlp is {self.mlp!r}; choose 'gelu' or 'swiglu'")
        _check(self.norm in ("layer", "rms"), f"norm is {self.norm!r}; choose 'layer' or 'rms'")
        _check(
            not self.ffn_norm or (self.mlp == "swiglu" and self.norm == "layer"),
            "ffn_norm is a LayerNorm inside SwiGLU; it needs mlp='swiglu' and norm='layer'",
        )
        _check(not self.inner_norm or self.norm == "layer", "inner_norm is a LayerNorm; it needs norm='layer'")
        _check(0 <= self.drop_path < 1, f"drop_path is {self.drop_path}; it must lie in [0, 1)")

    @property
    def image(self) -> tuple[int, int]:
        """(height, width) of the images, pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def patches(self) -> int:
        """Patches of an image, the class token not counted."""
        return math.prod(self.grid)

    def tokens(self, patch_drop: float = 0.0) -> int:
        """Tokens of an image, the class token counted, when this share of its patches is dropped."""
        return 1 + (max(1, int(self.patches * (1 - patch_drop))) if patch_drop else self.patches)

    @property
    def mlp_width(self) -> int:
        """The hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A causal pre-norm text transformer with exact GELU, as in CLIP."""

    context: int = 77  # tokens a caption may have at most
    vocabulary: int = 49408  # the end-of-text token has the largest id of a caption
    layers: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    eps: float = 1e-5  # of every norm in the tower
    token_init_std: float = 0.02
    position_init_std: float = 0.01

    def __post_init__(self):
        _check_counts(self, "context", "vocabulary", "layers", "width", "heads")
        _check_heads(self.width, self.heads)

    @property
    def mlp_width(self) -> int:
        """The hidden width of the MLP."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Two towers and the space they share."""

    name: str
    embed_dim: int  # of the joint space
    vision: VisionConfig
    text: TextConfig
    logit_scale_init: float = math.log(1 / 0.07)  # the model stores the logarithm


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


def _check_counts(tower: "VisionConfig | TextConfig", *names: str) -> None:
    for name in names:
        _check(getattr(tower, name) >= 1, f"{name} is {getattr(tower, name)}; it must be at least 1")


def _check_heads(width: int, heads: int) -> None:
    _check(width % heads == 0, f"width {width} is not a multiple of heads {heads}")
    _check(
        width // heads in HEAD_DIMS,
        f"width {width} over {heads} heads gives head dimension {width // heads}; 32 to 128 in steps of 8 are possible",
    )


# Vision towers. EVA-01 is pre-norm with biases; EVA-02 adds SwiGLU, sub-LayerNorms and rotary embedding; its largest
# normalises after each branch instead; the EVA-CLIP of 8 and 18 billion have RMSNorm and no q, v and head biases.
_EVA02 = VisionConfig(
    image_size=224,
    patch=14,
    layers=24,
    width=1024,
    heads=16,
    mlp="swiglu",
    mlp_ratio=2.6667,
    qkv_fused=False,
    inner_norm=True,
    ffn_norm=True,
    rope=True,
)
_EVA01_B = VisionConfig(image_size=224, patch=16, layers=12, width=768, heads=12, layer_scale=0.1)
_EVA01_G = VisionConfig(image_size=224, patch=14, layers=40, width=1408, heads=16, mlp_ratio=4.3637)
_EVA02_E = VisionConfig(
    image_size=224, patch=14, layers=64, width=1792, heads=16, mlp_ratio=8.571428571428571, post_norm=True
)
_EVA_8B = VisionConfig(
    image_size=224,
    patch=14,
    layers=32,
    width=4096,
    heads=32,
    mlp_ratio=5.0,
    norm="rms",
    qkv_bias=False,
    head_bias=False,
)
_EVA_18B = replace(_EVA_8B, layers=48, width=5120, heads=40, post_norm=True)

# Text towers, by width.
_TEXT_512 = TextConfig(layers=12, width=512, heads=8)
_TEXT_768 = TextConfig(layers=12, width=768, heads=12)
_TEXT_1024 = TextConfig(layers=24, width=1024, heads=16)
_TEXT_1280 = TextConfig(layers=32, width=1280, heads=20)

# Small enough for a test on a CPU; EVA-02's MLP is 170 wide, not a multiple of 8, as 2730 is not.
_TINY = VisionConfig(image_size=32, patch=8, layers=2, width=64, heads=2)
_TINY_EVA02 = replace(_EVA02, image_size=32, patch=8, layers=2, width=64, heads=2)
_TINY_EVA = replace(_EVA_8B, image_size=32, patch=8, layers=2, width=64, heads=2)
_TINY_TEXT = TextConfig(context=16, vocabulary=512, layers=2, width=64, heads=2)

# A row of handwritten digits, named by its number: three images of 8 x 8 pixels side by side.
_DIGITS = replace(
    _TINY_EVA02,
    image_size=(8, 24),
    patch=4,
    channels=1,
    layers=3,
    mlp_ratio=2.625,
    init_std=0.07,
    position_init_std=0.2,
    head_init_scale=1.0,
)
_DIGITS_TEXT = TextConfig(
    context=5, vocabulary=13, layers=1, width=128, heads=4, token_init_std=0.3, position_init_std=0.3
)

CONFIGS = {
    name: ClipConfig(name=name, embed_dim=embed_dim, vision=vision, text=text)
    for name, embed_dim, vision, text in (
        ("EVA01-CLIP-B-16", 512, _EVA01_B, _TEXT_512),
        ("EVA01-CLIP-g-14", 1024, replace(_EVA01_G, drop_path=0.4), _TEXT_768),
        ("EVA01-CLIP-g-14-plus", 1024, _EVA01_G, _TEXT_1024),
        ("EVA02-CLIP-B-16", 512, replace(_EVA02, patch=16, layers=12, width=768, heads=12), _TEXT_512),
        ("EVA02-CLIP-L-14", 768, _EVA02, _TEXT_768),
        ("EVA02-CLIP-L-14-336", 768, replace(_EVA02, image_size=336), _TEXT_768),
        ("EVA02-CLIP-bigE-14", 1024, _EVA02_E, _TEXT_1024),
        ("EVA02-CLIP-bigE-14-plus", 1024, _EVA02_E, _TEXT_1280),
        ("EVA-CLIP-8B", 1280, _EVA_8B, _TEXT_1280),
        ("EVA-CLIP-8B-plus", 1280, replace(_EVA_8B, image_size=448), _TEXT_1280),
        ("EVA-CLIP-18B", 1536, _EVA_18B, _TEXT_1280),
        ("EVA-CLIP-18B-336", 1536, replace(_EVA_18B, image_size=336), _TEXT_1280),
        ("EVA02-CLIP-tiny-digits", 64, _DIGITS, _DIGITS_TEXT),
        ("EVA01-CLIP-tiny", 64, _TINY, _TINY_TEXT),
        ("EVA01-CLIP-tiny-layerscale", 64, replace(_TINY, layer_scale=0.1), _TINY_TEXT),
        ("EVA02-CLIP-tiny", 64, _TINY_EVA02, _TINY_TEXT),
        ("EVA02-CLIP-tiny-postnorm", 64, replace(_TINY, post_norm=True), _TINY_TEXT),
        ("EVA-CLIP-tiny", 64, _TINY_EVA, _TINY_TEXT),
        ("EVA-CLIP-tiny-postnorm", 64, replace(_TINY_EVA, post_norm=True), _TINY_TEXT),
    )
}
ALIASES = {"EVA-CLIP-8B-448": "EVA-CLIP-8B-plus"}
