"""What the public functions of every family check and decide before an op is called."""

import torch
from torch import Tensor

_transforms_active = torch._C._are_functorch_transforms_active
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see this call; without it the `autograd.Function` is skipped.

    Raises:
        NotImplementedError: `torch.func.grad`, `jvp` and their like ask for a derivative, which none of ours would give
            them: an op below autograd is a constant to them.
    """
    if _transforms_active() and any(map(_derived, tensors)):
        raise NotImplementedError(
            "evakernels: torch.func's grad, vjp, jvp, jacrev, jacfwd and hessian are not covered; use torch.autograd,"
            " or undo() the replacement of a model"
        )
    if torch.is_grad_enabled():
        for tensor in tensors:  # a third of the time of any()
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _derived(tensor: Tensor | None) -> bool:
    """Whether a transform of torch.func differentiates with respect to it, or to what it was computed of."""
    functorch = torch._C._functorch
    while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype an output takes: autocast's where autocast is on, else that of `x`. float64 stays."""
    dtype, device = x.dtype, x.device.type
    return torch.get_autocast_dtype(device) if dtype != torch.float64 and autocast_enabled(device) else dtype


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; "meta" has none, and torch raises when asked."""
    return device != "meta" and torch.is_autocast_enabled(device)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def floating(function: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless every tensor given has a floating dtype that the kernels know."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
            raise TypeError(f"{function}: {name} has dtype {tensor.dtype}; allowed are {allowed}")


def shape(function: str, name: str, tensor: Tensor | None, expected: tuple[int, ...], because: str) -> None:
    """Raise ValueError unless a tensor, where given, has the expected shape."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, expected {expected} ({because})")


def same_device(function: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors lie on the device of `x`."""
    device = x.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{function}: {name} is on {tensor.device}, but the input is on {device}")
