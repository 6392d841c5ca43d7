"""Fast kernels for what is not a matrix product in a vision-language transformer."""

from evakernels.dispatch import using
from evakernels.ops.norm import add_norm, layer_norm, norm_add, rms_norm

__version__ = "0.1.0"

__all__ = ["add_norm", "layer_norm", "norm_add", "rms_norm", "using"]
