"""The LAMB step over lists of tensors, and the optimizer around it."""

from evakernels.dispatch import define
from evakernels.ops.lamb.optimizer import FusedLAMB

__all__ = ["FusedLAMB", "lamb_step"]

lamb_step = define(
    "lamb",
    # Groups lie one after another in the lists: `sizes` tensors each, and one option each in the lists of options.
    # `masters` holds one tensor for each bfloat16 or float16 parameter, in order. `slices` is how many slices of a
    # flattened group have a trust ratio each; 0: each tensor has its own. Returns the norm of all gradients,
    # empty where nothing limits it, and the smallest and the largest trust ratio, 0 where there was none.
    "lamb_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] masters, Tensor(e!)[] steps, int[] sizes, Tensor lrs, float[] beta1s, float[] beta2s, float[] epss,"
    " float[] weight_decays, float[] lows, float[] highs, bool[] adapts, str bias_correction, int slices,"
    " float? max_grad_norm, Tensor? grad_scale, Tensor? found_inf) -> (Tensor norm, Tensor ratios)",
    lambda params, grads, exp_avgs, exp_avg_sqs, masters, steps, sizes, lrs, beta1s, beta2s, epss, weight_decays,
    lows, highs, adapts, bias_correction, slices, max_grad_norm, grad_scale, found_inf: (
        exp_avgs[0].new_empty(() if max_grad_norm is not None else (0,)),
        exp_avgs[0].new_empty(2),
    ),
)  # fmt: skip
