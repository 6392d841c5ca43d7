"""The four ops over kernels that read rows of gate and up, and write their results, wherever these lie in memory."""

from collections.abc import Callable

from torch import Tensor

from evakernels.ops import checks


def operators(forward: Callable, backward: Callable) -> tuple[Callable, Callable, Callable, Callable]:
    """swiglu and its backward; the same of gate and up side by side, padded beyond `width`.

    Args:
        forward: of rows, (gate, up, weight, bias, y, mean, rstd, eps, width); fills y, mean and rstd.
        backward: of rows, (dy, gate, up, weight, mean, rstd, dgate, dup, dweight, dbias, width); fills the gradients.
    """

    def swiglu(gate: Tensor, up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        y, (mean, rstd) = gate.new_empty(gate.shape), statistics(gate, weight)
        forward(_rows(gate), _rows(up), weight, bias, y, mean, rstd, eps, gate.shape[-1])
        return y, mean, rstd

    def swiglu_backward(dy, gate, up, weight, mean, rstd, bias: bool):
        dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
        weights = weight_gradients(gate, weight, bias)
        given = _rows(dy), _rows(gate), _rows(up), weight, mean, rstd
        backward(*given, _rows(dgate), _rows(dup), *weights, gate.shape[-1])
        return dgate, dup, *weights

    def swiglu_packed(gate_up: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, width: int):
        y, (mean, rstd) = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)), statistics(gate_up, weight)
        gate, up = _rows(gate_up).chunk(2, -1)
        forward(gate, up, weight, bias, y, mean, rstd, eps, width)
        return y, mean, rstd

    def swiglu_packed_backward(dy, gate_up, weight, mean, rstd, bias: bool, width: int):
        dgate_up, weights = gate_up.new_empty(gate_up.shape), weight_gradients(gate_up, weight, bias)
        (gate, up), (dgate, dup) = _rows(gate_up).chunk(2, -1), _rows(dgate_up).chunk(2, -1)
        backward(_rows(dy), gate, up, weight, mean, rstd, dgate, dup, *weights, width)
        return dgate_up, *weights

    return swiglu, swiglu_backward, swiglu_packed, swiglu_packed_backward


def statistics(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and 1/std of each row; empty without a weight, where there is no norm."""
    shape, acc = x.shape[:-1] if weight is not None else (0,), checks.accumulator(x.dtype)
    return x.new_empty(shape, dtype=acc), x.new_empty(shape, dtype=acc)


def weight_gradients(x: Tensor, weight: Tensor | None, bias: bool) -> tuple[Tensor, Tensor]:
    """Those of the weight and the bias; empty where they are not wanted."""
    like = weight if weight is not None else x.new_empty(0)
    return like.new_empty(like.shape), like.new_empty(like.shape if bias else (0,))


def _rows(x: Tensor) -> Tensor:
    """(rows, columns) with neighbouring columns side by side; copied where no view of `x` is so."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
