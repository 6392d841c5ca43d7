"""Fast kernels for what is not a matrix product in a vision-language transformer."""

from evakernels import native, nn
from evakernels.dispatch import using
from evakernels.ops.attention import Rope2d, apply_rope, attention, attention_qkvpacked
from evakernels.ops.contrastive import contrastive_loss, sigmoid_loss
from evakernels.ops.lamb import FusedLAMB
from evakernels.ops.norm import add_norm, layer_norm, norm_add, rms_norm
from evakernels.ops.swiglu import swiglu, swiglu_norm, swiglu_norm_packed
from evakernels.ops.tokens import gather_tokens, patchify, sample_kept_tokens

__version__ = "0.1.0"

__all__ = [
    "FusedLAMB",
    "Rope2d",
    "add_norm",
    "apply_rope",
    "attention",
    "attention_qkvpacked",
    "contrastive_loss",
    "gather_tokens",
    "layer_norm",
    "native",
    "nn",
    "norm_add",
    "patchify",
    "rms_norm",
    "sample_kept_tokens",
    "sigmoid_loss",
    "swiglu",
    "swiglu_norm",
    "swiglu_norm_packed",
    "using",
]
