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
    for family in dispatch.FAMILIES:
        found = {name: dispatch.implementation(family, name) for name in dispatch.IMPLEMENTATIONS}
        print(f"{family}: {', '.join(n for n, m in found.items() if not isinstance(m, str)) or 'nothing'}")
        for name, module in found.items():
            if isinstance(module, str) and name != "cpu":
                print(f"    no {name}: {module}")


if __name__ == "__main__":
    main()
