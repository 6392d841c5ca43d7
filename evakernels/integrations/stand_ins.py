"""Stand-ins for the parts of xformers, apex and deepspeed that CLIP codebases import, where these cannot be installed.

`install("xformers", "apex", "deepspeed")` makes these importable, computed by this package on any of its devices:

    xformers.ops          memory_efficient_attention, LowerTriangularMask
    apex.normalization    FusedLayerNorm, FusedRMSNorm
    apex.optimizers       FusedLAMB
    deepspeed.ops.lamb    FusedLamb

What is not covered raises, with what is: nothing is ignored that would change a result.
"""

import importlib
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from evakernels.ops.attention import attention
from evakernels.ops.lamb import FusedLAMB as _FusedLAMB
from evakernels.ops.norm import layer_norm, rms_norm

__all__ = ["StandIns", "install"]


class LowerTriangularMask:
    """xformers' causal mask: token n sees tokens 0 to n."""


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: LowerTriangularMask | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`xformers.ops.memory_efficient_attention` of one sequence with itself, by `evakernels.attention`.

    Args:
        query, key, value: (B, N, H, D), or (B, N, D) for one head; one shape, as in `evakernels.attention`.
        attn_bias: None, or a `LowerTriangularMask`.
        p: must be 0.
        scale: of the scores; D ** -0.5 where None.
        op: must be None.
        output_dtype: that of the result; that of `evakernels.attention` where None.

    Returns:
        A tensor of the shape of `query`.

    Raises:
        NotImplementedError: an option asks for what is not covered.
        ValueError, TypeError: as `evakernels.attention`.
    """
    covered = "the stand-in covers attn_bias None or LowerTriangularMask(), p=0, op=None, and one shape for all three"
    if not (attn_bias is None or isinstance(attn_bias, LowerTriangularMask)):
        raise NotImplementedError(f"memory_efficient_attention: attn_bias is {_described(attn_bias)}; {covered}")
    if p != 0 or op is not None:
        raise NotImplementedError(f"memory_efficient_attention: p is {p} and op {op}; {covered}")
    if not query.shape == key.shape == value.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise NotImplementedError(f"memory_efficient_attention: query, key, value have shapes {shapes}; {covered}")
    if query.dim() not in (3, 4):
        raise NotImplementedError(
            f"memory_efficient_attention: query has shape {tuple(query.shape)}; the stand-in covers (B, N, H, D) and"
            " (B, N, D)"
        )
    causal, one_head = attn_bias is not None, query.dim() == 3
    if one_head:
        query, key, value = (x.unsqueeze(2) for x in (query, key, value))
    out = attention(query, key, value, causal=causal, scale=scale)
    return (out.squeeze(2) if one_head else out).to(out.dtype if output_dtype is None else output_dtype)


class _FusedNorm(nn.Module):
    """What apex's two norms share; keys `weight` and, of LayerNorm, `bias`."""

    def __init__(
        self,
        normalized_shape: int | Iterable[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        *,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if len(shape) != 1:
            raise NotImplementedError(
                f"{type(self).__name__}: normalized_shape is {shape}; the stand-in covers the last dimension alone:"
                " pass its size"
            )
        self.normalized_shape = torch.Size(shape)
        self.eps, self.elementwise_affine, self.memory_efficient = eps, elementwise_affine, memory_efficient
        for name in self._parameter_names:
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if elementwise_affine else None)
        self.reset_parameters()

    weight: nn.Parameter | None
    _parameter_names: tuple[str, ...]

    def reset_parameters(self) -> None:
        """Weights to one, biases to zero."""
        for name in self._parameter_names if self.elementwise_affine else ():
            nn.init.constant_(getattr(self, name), float(name == "weight"))

    def extra_repr(self) -> str:
        return f"{tuple(self.normalized_shape)}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"

    def _weight(self, x: Tensor) -> Tensor:
        return torch.ones(self.normalized_shape, device=x.device) if self.weight is None else self.weight


class FusedLayerNorm(_FusedNorm):
    """`apex.normalization.FusedLayerNorm` over the last dimension, by `evakernels.layer_norm`.

    As apex's, it gives autocast's dtype under autocast; unlike apex, weights are not rounded to it. `memory_efficient`
    changes no result and is without effect.
    """

    bias: nn.Parameter | None
    _parameter_names = ("weight", "bias")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (..., C) over C."""
        return layer_norm(input, self._weight(input), self.bias, self.eps)


class FusedRMSNorm(_FusedNorm):
    """`apex.normalization.FusedRMSNorm` over the last dimension, by `evakernels.rms_norm`; as `FusedLayerNorm`."""

    _parameter_names = ("weight",)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (..., C) over C."""
        return rms_norm(input, self._weight(input), self.eps)


class FusedLAMB(_FusedLAMB):
    """`apex.optimizers.FusedLAMB`, by `evakernels.FusedLAMB`.

    State is `evakernels.FusedLAMB`'s: moments are float32, bfloat16 and float16 parameters have float32 masters (apex
    has none), and each parameter counts its own steps.

    Args:
        params, lr, betas, eps, weight_decay, bias_correction, max_grad_norm: as apex's, with its defaults.
        use_nvlamb: apply the trust ratio to groups without weight decay as well.
        set_grad_none: what `zero_grad()` does to gradients, None or zero.
        amsgrad, adam_w_mode, grad_averaging: must be False, True and True.

    Raises:
        NotImplementedError: an option asks for what is not covered.
        ValueError, TypeError: as `evakernels.FusedLAMB`.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        if amsgrad or not adam_w_mode or not grad_averaging:
            raise NotImplementedError(
                f"apex's FusedLAMB: amsgrad is {amsgrad}, adam_w_mode {adam_w_mode} and grad_averaging"
                f" {grad_averaging}; the stand-in covers False, True and True"
            )
        self.set_grad_none = set_grad_none
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            max_grad_norm=max_grad_norm,
            bias_correction="update" if bias_correction else None,
            adapt_excluded=bool(use_nvlamb),
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"set_grad_none": self.set_grad_none}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `evakernels.FusedLAMB`; what apex takes for all groups alone may not be a group's."""
        _refuse_options("apex's FusedLAMB", param_group, ("amsgrad", "adam_w_mode", "grad_averaging", "use_nvlamb"))
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Gradients to None, or to zero where `set_grad_none` is False; `set_to_none` decides where it is given."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)


class FusedLamb(_FusedLAMB):
    """`deepspeed.ops.lamb.FusedLamb`, by `evakernels.FusedLAMB`: one trust ratio per parameter.

    DeepSpeed's engine itself is not here; under its ZeRO a ratio is that of a slice of a group, which
    `evakernels.FusedLAMB(..., trust=("shard", R))` reproduces.

    Args:
        params, lr, betas, eps, weight_decay, bias_correction: as DeepSpeed's, with its defaults.
        min_coeff, max_coeff: bounds of the trust ratio.
        max_grad_norm: must be 0 (DeepSpeed's reads norms that its engine passes to `step`).
        eps_inside_sqrt, amsgrad: must be False.

    Raises:
        NotImplementedError: an option asks for what is not covered.
        ValueError, TypeError: as `evakernels.FusedLAMB`.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        if eps_inside_sqrt or amsgrad or max_grad_norm:
            raise NotImplementedError(
                f"deepspeed's FusedLamb: eps_inside_sqrt is {eps_inside_sqrt}, amsgrad {amsgrad} and max_grad_norm"
                f" {max_grad_norm}; the stand-in covers False, False and 0: clip with"
                " torch.nn.utils.clip_grad_norm_ before step()"
            )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            trust_ratio_bounds=(min_coeff, max_coeff),
            adapt_excluded=True,
            bias_correction="step_size" if bias_correction else None,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `evakernels.FusedLAMB`; a group's own trust ratio bounds are `trust_ratio_bounds`."""
        _refuse_options("deepspeed's FusedLamb", param_group, ("min_coeff", "max_coeff", "eps_inside_sqrt", "amsgrad"))
        super().add_param_group(param_group)

    def step(self, closure=None, grads=None, output_params=None, scale=1.0, grad_norms=None):
        """Update every parameter that has a gradient; what DeepSpeed's engine would pass besides must be left out."""
        if grads is not None or output_params is not None or scale != 1 or grad_norms is not None:
            raise NotImplementedError(
                "deepspeed's FusedLamb: step() was given grads, output_params, scale or grad_norms; the stand-in covers"
                " the gradients of the parameters alone"
            )
        return super().step(closure)

    def get_lamb_coeffs(self) -> NoReturn:
        """Not covered: trust ratios stay on the device."""
        raise NotImplementedError("deepspeed's FusedLamb: get_lamb_coeffs() is not covered by the stand-in")


COVERED: dict[str, dict[str, dict[str, Any]]] = {
    "xformers": {
        "xformers.ops": {
            "memory_efficient_attention": memory_efficient_attention,
            "LowerTriangularMask": LowerTriangularMask,
        },
    },
    "apex": {
        "apex.normalization": {"FusedLayerNorm": FusedLayerNorm, "FusedRMSNorm": FusedRMSNorm},
        "apex.optimizers": {"FusedLAMB": FusedLAMB},
    },
    "deepspeed": {"deepspeed.ops.lamb": {"FusedLamb": FusedLamb}},
}


class _StandIn(ModuleType):
    """A module that has what is covered, and names it when asked for something else."""

    def __init__(self, name: str) -> None:
        super().__init__(name, f"Stands in for a part of {name.partition('.')[0]}; by evakernels.")
        self.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=True)
        # `from apex import amp` reports the file of the module, and this one says what there is.
        self.__path__, self.__file__ = [], __file__

    def __getattr__(self, name: str) -> NoReturn:
        package = self.__name__.partition(".")[0]
        covered = "; ".join(f"{module}: {', '.join(names)}" for module, names in COVERED[package].items())
        raise AttributeError(
            f"module {self.__name__!r} is evakernels' stand-in and has no {name!r}; it covers {covered}"
        )


class StandIns:
    """What `install` did.

    Attributes:
        installed: the packages that now have stand-ins.
        skipped: those that have none, with the reason.
    """

    def __init__(self) -> None:
        self.installed: list[str] = []
        self.skipped: dict[str, str] = {}
        self._before: dict[ModuleType, ModuleType | None] = {}

    def undo(self) -> None:
        """Take the stand-ins out of `sys.modules`; whoever imported from them keeps what was imported."""
        for module, before in self._before.items():
            if sys.modules.get(module.__name__) is module:
                if before is None:
                    del sys.modules[module.__name__]
                else:
                    sys.modules[module.__name__] = before
        self.installed, self._before = [], {}

    def __str__(self) -> str:
        lines = [f"stand-in for {name}" for name in self.installed]
        return "\n".join(lines + [f"no stand-in for {name}: {reason}" for name, reason in self.skipped.items()])


def install(*packages: str) -> StandIns:
    """Put stand-ins into `sys.modules` for those of the packages that cannot be imported themselves.

    To be called before the code that imports them; other libraries then find the packages too, so name only those that
    the code at hand needs. A package whose covered parts can be imported is left alone, and so is the rest.

    Args:
        packages: "xformers", "apex", "deepspeed".

    Returns:
        What was done; `.undo()` takes it back.

    Raises:
        ValueError: a package has no stand-in, or none was named.
    """
    unknown = [name for name in packages if name not in COVERED]
    if unknown or not packages:
        raise ValueError(f"stand_ins.install: {packages} was given; allowed are any of {', '.join(COVERED)}")
    done = StandIns()
    for package in dict.fromkeys(packages):
        if isinstance(sys.modules.get(package), _StandIn):
            done.skipped[package] = "it already has one"
        elif _importable(package):
            done.skipped[package] = "it can be imported itself"
        else:
            _put(package, done)
            done.installed.append(package)
    return done


def _importable(package: str) -> bool:
    try:
        for name, covered in COVERED[package].items():
            module = importlib.import_module(name)
            if not all(hasattr(module, attribute) for attribute in covered):
                return False
    except Exception:  # a library built for another torch fails in many ways
        return False
    return True


def _put(package: str, done: StandIns) -> None:
    modules: dict[str, _StandIn] = {}
    for full, covered in COVERED[package].items():
        parts = full.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            module = modules.setdefault(name, _StandIn(name))
            if depth > 1:
                setattr(modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
        vars(modules[full]).update(covered)
    for name, module in modules.items():
        done._before[module] = sys.modules.get(name)
        sys.modules[name] = module


def _described(x: object) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _refuse_options(optimizer: str, group: Any, options: tuple[str, ...]) -> None:
    for name in options:
        if isinstance(group, dict) and name in group:
            raise NotImplementedError(f"{optimizer}: a group has {name} of its own, which the stand-in does not cover")
