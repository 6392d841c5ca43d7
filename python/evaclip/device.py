"""Where to compute."""

from concurrent.futures import ThreadPoolExecutor

import torch


def pick_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1" ..., or "auto", CUDA where there is one.

    Raises:
        ValueError: no such device, or no GPU that torch can use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f'the device is {name!r}; allowed are "auto", "cpu", "cuda", "cuda:1" ...')
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"the device is {name!r}, but torch finds no such GPU; `python -m evakernels` tells why")
    return torch.device(name)


def one_thread(name: str, device: torch.device | None = None) -> ThreadPoolExecutor:
    """A pool of one thread, whose current GPU is `device`, where that is one."""
    if device is None or device.type != "cuda":
        return ThreadPoolExecutor(1, name)
    # A new thread's GPU is the first one, where every process of a server would leave its mark.
    return ThreadPoolExecutor(1, name, torch.cuda.set_device, (device,))
