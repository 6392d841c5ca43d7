"""`python -m evakernels`: what works on this machine, what does not, and what to do about it."""

import platform

import torch

import evakernels
from evakernels import dispatch, native


def main() -> None:
    print(f"evakernels {evakernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            print(f"GPU {index}: {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    else:
        reason = "this torch is a CPU build" if torch.version.cuda is None else "torch finds none"
        print(f"GPU: none ({reason})")
    print(f"compiled library: {native.status()}\n")
    gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if gpu else None
    print(f"What is asked to serve, in order, on {'a GPU' if gpu else 'the CPU'}:")
    for family in dispatch.FAMILIES:
        found = {name: dispatch.implementation(family, name) for name in dispatch.IMPLEMENTATIONS}
        for rule in dispatch.rules(family, "cuda" if gpu else "cpu", capability):
            there = ", ".join(name for name in rule.order if not isinstance(found[name], str))
            print(f"{family}: {there}{rule.words and f', for {rule.words}'}: {rule.reason}")
        for name, module in found.items():
            if isinstance(module, str) and name != "cpu":
                alone = name == "triton" and not isinstance(found["cuda"], str)
                print(f"    no {name}: {module}{alone * '; without the compiled library plain PyTorch serves'}")


if __name__ == "__main__":
    main()
