"""What the public functions of every family check and decide before an op is called."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see this call; without it the `autograd.Function` is skipped."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype an output takes: autocast's where autocast is on, else that of `x`. float64 stays."""
    device = x.device.type
    if x.dtype != torch.float64 and autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; "meta" has none, and torch raises when asked."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


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
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, expected {expected} ({because})")


def same_device(function: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless all tensors lie on the device of `x`."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{function}: {name} is on {tensor.device}, but the input is on {x.device}")
