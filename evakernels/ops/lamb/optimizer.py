"""LAMB as a `torch.optim.Optimizer`."""

import math
import sys
from collections.abc import Callable, Iterable
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from evakernels.ops import checks

CORRECTIONS = ("update", "step_size", None)
# What a group may set for itself, and what holds for all groups alike.
OPTIONS = ("lr", "betas", "eps", "weight_decay", "trust_ratio_bounds", "adapt_excluded")
GLOBAL = ("max_grad_norm", "bias_correction", "trust", "capturable")
MOMENTS = ("exp_avg", "exp_avg_sq", "master")  # of a parameter, in its shape


class FusedLAMB(Optimizer):
    """LAMB with float32 moments and master weights, in as few passes over memory as the device allows.

    Parameters may be DTensors (FSDP2's `fully_shard`, hybrid or replicated ones), also beside plain tensors that are
    the same on every rank: norms and trust ratios are those of the whole tensors, by two packed all-reduces over the
    dimensions that shard them. State then has the parameter's placement.

    A group without weight decay takes plain Adam steps, without a trust ratio, unless `adapt_excluded` is True.

    EVA-CLIP's own optimizer file (NVIDIA's variant, also timm's): `max_grad_norm=1.0` and the defaults. DeepSpeed's,
    which trained the published weights: `bias_correction="step_size"`, `trust_ratio_bounds=(0.01, 10)`,
    `adapt_excluded=True`, `trust=("shard", R)` with R the number of data-parallel ranks.

    Args:
        params: parameters, or groups of them; float32, bfloat16, float16 or float64, on one device. A group may set
            its own lr, betas, eps, weight_decay, trust_ratio_bounds and adapt_excluded.
        lr: learning rate; a number or a tensor of one element. `group["lr"]` is read at every step.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: added to the update, times the parameter, before the trust ratio.
        max_grad_norm: gradients are scaled by max_grad_norm / norm where the norm of all of them exceeds it.
            `optimizer.grad_norm` is then that norm, before the scaling, as a tensor on the device.
        trust_ratio_bounds: (lowest, highest) trust ratio; None: any.
        adapt_excluded: apply the trust ratio to groups without weight decay as well.
        bias_correction: "update" corrects both moments; "step_size" multiplies the learning rate by
            sqrt(1 - beta2^t) / (1 - beta1^t), weight decay included; None corrects nothing.
        trust: one ratio per "parameter", per "group", or per slice: ("shard", R) flattens a group's parameters in
            order, pads them with zeros to a multiple of R elements and cuts them into R slices; R need not be the
            number of today's ranks.
        capturable: `step()` may be captured in a CUDA graph, after a first one that is not; every lr must then be a
            tensor on the device.

    Parameters without a gradient are skipped (slices are cut as if they were not there), on all ranks alike; gradients
    are left as they are. `GradScaler` is served without waiting for the device. `optimizer.trust_ratios` are the
    smallest and the largest trust ratio of the last step, a tensor of two on the device; 0 where it was skipped or had
    none. A parameter's state is `step`, `exp_avg`, `exp_avg_sq`, and `master` where it is bfloat16 or float16; loading
    keeps their dtypes and copies them. Code that changes such a parameter between steps (clamps it, loads weights) must
    also change `optimizer.state[p]["master"]`, from which it is rounded, or delete it: it is then made anew.

    Raises:
        ValueError, TypeError: an option or a parameter does not fit.
        NotImplementedError: a DTensor is a partial sum, or ("shard", R) meets a placement other than Shard, Replicate.
        RuntimeError: a gradient is sparse or on another mesh, or `step()` is captured without `capturable`.

    Source: You et al., arXiv 1904.00962.
    """

    _step_supports_amp_scaling = True  # GradScaler sets `grad_scale` and `found_inf` before it calls step()
    grad_norm: Tensor | None = None
    trust_ratios: Tensor | None = None

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        max_grad_norm: float | None = None,
        trust_ratio_bounds: tuple[float, float] | None = None,
        adapt_excluded: bool = False,
        bias_correction: str | None = "update",
        trust: str | tuple[str, int] = "parameter",
        capturable: bool = False,
    ):
        if max_grad_norm is not None and not (_is_number(max_grad_norm) and max_grad_norm > 0):
            raise ValueError(f"FusedLAMB: max_grad_norm is {max_grad_norm!r}; give a positive number, or None")
        if bias_correction not in CORRECTIONS:
            raise ValueError(f'FusedLAMB: bias_correction is {bias_correction!r}; give "update", "step_size" or None')
        if not isinstance(capturable, bool):
            raise ValueError(f"FusedLAMB: capturable is {capturable!r}; give True or False")
        self.slices = _slices(trust)
        self.max_grad_norm = max_grad_norm
        self.bias_correction = bias_correction
        self.trust = trust
        self.capturable = capturable
        options = (lr, betas, eps, weight_decay, trust_ratio_bounds, adapt_excluded)
        super().__init__(params, dict(zip(OPTIONS, options, strict=True)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own; those it does not name are the constructor's.

        Raises:
            ValueError, TypeError: an option or a parameter does not fit.
        """
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                _check_param(param)
        except (TypeError, NotImplementedError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` returned, where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self.grad_norm = self.trust_ratios = None
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        groups = [(group, params) for group, params in groups if params]
        if not groups:
            return loss
        params = [p for _, of_group in groups for p in of_group]
        device = params[0].device
        self._check_capture(device, params, [group["lr"] for group, _ in groups])
        states = [self._state_of(p, device) for p in params]
        grads: list[Any] = [p.grad for p in params]
        lamb_step: Callable = torch.ops.evakernels.lamb_step.default
        if _any_distributed(params):
            from evakernels.ops.lamb import layout, sharded

            grads, lamb_step = list(map(layout.gradient, params)), sharded.lamb_step
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        bounds = [group["trust_ratio_bounds"] or (0.0, math.inf) for group, _ in groups]
        norm, self.trust_ratios = lamb_step(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["master"] for state in states if "master" in state],
            [state["step"] for state in states],
            [len(of_group) for _, of_group in groups],
            _learning_rates([group["lr"] for group, _ in groups], device),
            [group["betas"][0] for group, _ in groups],
            [group["betas"][1] for group, _ in groups],
            [group["eps"] for group, _ in groups],
            [group["weight_decay"] for group, _ in groups],
            [low for low, _ in bounds],
            [high for _, high in bounds],
            [group["adapt_excluded"] or group["weight_decay"] != 0 for group, _ in groups],
            self.bias_correction or "none",
            self.slices,
            self.max_grad_norm,
            None if grad_scale is None else grad_scale.to(device, non_blocking=True),
            None if found_inf is None else found_inf.to(device, non_blocking=True),
        )
        # The op works below autograd, which must still notice a backward pass through what was changed.
        torch.autograd.graph.increment_version(params)
        if self.max_grad_norm is not None:
            self.grad_norm = norm
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state: tensors are copied to their parameter's device, and keep float32 (see the class).

        Options come from the state dict, those of the constructor that hold for all groups stay. A master saved
        for a parameter that is float32 here is dropped. The states of Adam, and of LAMBs that count a group's steps
        (timm's, NVIDIA's, EVA-CLIP's), fit too.

        Raises:
            ValueError: a state has another shape than its parameter, or no number of steps; nothing is loaded then.
        """
        last: dict[str, Any] = {}
        # PyTorch casts floating state to the parameter's dtype. The tensors are taken again from what the caller's
        # hooks have made of the state dict, before the caller's other hooks see the result.
        handles = (
            self.register_load_state_dict_pre_hook(lambda _, loaded: last.update(self._checked(loaded))),
            self.register_load_state_dict_post_hook(lambda _: self._take_over(last), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _checked(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """The state dict, whose states must fit the parameters and know their steps; PyTorch compares groups."""
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        numbers = ((number, group) for group in loaded["param_groups"] for number in group["params"])
        for place, ((number, group), param) in enumerate(zip(numbers, params, strict=False)):
            state = loaded["state"].get(number, {})
            for key in MOMENTS:
                if key in state and state[key].shape != param.shape:
                    raise ValueError(
                        f"FusedLAMB: {key} of parameter {place} has shape {tuple(state[key].shape)} in the state dict, "
                        f"the parameter {tuple(param.shape)}; load the state of the same model, its parameters in the "
                        "same order, or begin without one"
                    )
            if "exp_avg" in state and "step" not in state and "step" not in group:
                raise ValueError(
                    f"FusedLAMB: the state dict has moments of parameter {place}, but not how many steps they are of; "
                    'give its state a "step"'
                )
        return loaded

    def _take_over(self, loaded: dict[str, Any]) -> None:
        numbers = ((number, group) for group in loaded["param_groups"] for number in group["params"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for (number, group), param in zip(numbers, params, strict=True):
            state = dict(loaded["state"].get(number, {}))
            if "exp_avg" in state:
                steps = state.get("step", group.get("step"))
                state["step"] = steps if isinstance(steps, Tensor) else torch.tensor(float(steps))
            for key, value in state.items():
                wide = checks.accumulator(param.dtype)
                if key == "master" and param.dtype == wide:
                    del self.state[param][key]
                elif isinstance(value, Tensor):
                    dtype = torch.float32 if key == "step" else wide if value.is_floating_point() else value.dtype
                    if key != "step" and _any_distributed([param, value]):
                        from evakernels.ops.lamb import layout

                        value = layout.placed(param, value)
                    self.state[param][key] = value.detach().to(
                        param.device, dtype, copy=True, memory_format=torch.contiguous_format
                    )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in (*GLOBAL, "slices")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in OPTIONS:  # which a checkpoint of another optimizer may lack
                group.setdefault(name, self.defaults[name])

    def _state_of(self, param: Tensor, device: torch.device) -> dict[str, Tensor]:
        assert param.grad is not None
        if param.grad.layout != torch.strided:
            raise RuntimeError(
                f"FusedLAMB: a gradient of shape {tuple(param.shape)} has layout {param.grad.layout}; only dense "
                "gradients are allowed, so build the embedding with sparse=False"
            )
        if param.device != device:
            raise RuntimeError(
                f"FusedLAMB: parameters with gradients are on {device} and on {param.device}; all must be on one "
                "device, so build one optimizer for each"
            )
        state = self.state[param]
        if "exp_avg" not in state:
            wide = checks.accumulator(param.dtype)
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for key in ("exp_avg", "exp_avg_sq"):  # of a DTensor: placed like it
                state[key] = torch.zeros_like(param, dtype=wide, memory_format=torch.contiguous_format)
        elif state["exp_avg"].shape != param.shape:  # kernels go by the parameter's
            raise RuntimeError(
                f"FusedLAMB: a parameter has shape {tuple(param.shape)}, its moments {tuple(state['exp_avg'].shape)}; "
                "build a new optimizer for a parameter that was exchanged"
            )
        if "master" not in state and param.dtype in (torch.bfloat16, torch.float16):
            state["master"] = param.detach().to(torch.float32, memory_format=torch.contiguous_format)
        return state

    def _check_capture(self, device: torch.device, params: list[Tensor], lrs: list[float | Tensor]) -> None:
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return
        if not self.capturable:
            raise RuntimeError("FusedLAMB: step() is being captured in a CUDA graph; build with capturable=True")
        if not all(isinstance(lr, Tensor) and lr.device == device for lr in lrs):
            raise RuntimeError(
                f"FusedLAMB: a captured step() would repeat today's learning rate for ever; make every group's lr "
                f"a tensor on {device} and let the schedule fill it"
            )
        if not all("exp_avg" in self.state[p] for p in params):
            raise RuntimeError(
                "FusedLAMB: a captured first step() would begin anew at every replay, with moments of 0; take a step "
                "before the capture"
            )


def _learning_rates(lrs: list[float | Tensor], device: torch.device) -> Tensor:
    """One float64 tensor; on the host unless a learning rate is a tensor on the device."""
    if not any(isinstance(lr, Tensor) and lr.device == device for lr in lrs):
        return torch.tensor([float(lr) for lr in lrs], dtype=torch.float64)
    # `full` launches a kernel: no copy from the host, which a graph could not hold.
    return torch.stack(
        [
            lr.reshape(()).to(device, torch.float64)
            if isinstance(lr, Tensor)
            else torch.full((), lr, dtype=torch.float64, device=device)
            for lr in lrs
        ]
    )


def _slices(trust: str | tuple[str, int]) -> int:
    """How many trust ratios a group has; 0: as many as parameters."""
    if trust == "parameter":
        return 0
    if trust == "group":
        return 1
    if isinstance(trust, tuple | list) and len(trust) == 2 and trust[0] == "shard":
        slices = trust[1]
        if isinstance(slices, int) and not isinstance(slices, bool) and slices >= 1:
            return slices
    raise ValueError(
        f'FusedLAMB: trust is {trust!r}; give "parameter", "group" or ("shard", R) with R >= 1, '
        "the number of ranks that shared the group"
    )


def _is_number(value: Any, kind: Any = int | float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _check_options(options: dict[str, Any]) -> None:
    for name in GLOBAL:
        if name in options:
            raise ValueError(f"FusedLAMB: {name} holds for all groups; give it to the constructor, not to a group")
    lr, betas, bounds = options["lr"], options["betas"], options["trust_ratio_bounds"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"FusedLAMB: lr is a tensor of shape {tuple(lr.shape)}; give a number or one element")
    elif not (_is_number(lr, Real) and lr >= 0):
        raise ValueError(f"FusedLAMB: lr is {lr!r}; give a number that is not negative, or a tensor of one element")
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)):
        raise ValueError(f"FusedLAMB: betas is {betas!r}; give two numbers, at least 0 and below 1")
    if not (_is_number(options["eps"]) and options["eps"] > 0):
        raise ValueError(
            f"FusedLAMB: eps is {options['eps']!r}; give a positive number "
            "(an element whose gradients were all 0 would divide 0 by 0)"
        )
    if not (_is_number(options["weight_decay"]) and options["weight_decay"] >= 0):
        raise ValueError(f"FusedLAMB: weight_decay is {options['weight_decay']!r}; give a number that is not negative")
    if bounds is not None and not (
        isinstance(bounds, tuple | list)
        and len(bounds) == 2
        and all(isinstance(b, int | float) and not isinstance(b, bool) for b in bounds)
        and 0 <= bounds[0] <= bounds[1]
        and bounds[1] > 0
    ):
        raise ValueError(f"FusedLAMB: trust_ratio_bounds is {bounds!r}; give (lowest, highest), or None")
    if not isinstance(options["adapt_excluded"], bool):
        raise ValueError(f"FusedLAMB: adapt_excluded is {options['adapt_excluded']!r}; give True or False")


def _check_param(param: Tensor) -> None:
    checks.floating("FusedLAMB", parameter=param)
    if _any_distributed([param]):
        from evakernels.ops.lamb import layout

        if why := layout.refusal(param):
            raise NotImplementedError(why)


def _any_distributed(tensors: Iterable[Tensor]) -> bool:
    """Whether there is a DTensor among them; where nobody has imported DTensor there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)
