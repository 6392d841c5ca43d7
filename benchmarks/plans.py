"""How the attention kernels are launched, as the table of docs/attention.md; nothing is run.

`python -m benchmarks.plans`: per head dimension and length, forward and backward, for the shared memory of a block on
consumer GPUs (99 KiB), A100 (163) and H100 (227).
"""

import csv
from pathlib import Path
from unittest import mock

import torch

import evakernels as ek
from benchmarks import resources
from evakernels import native

LIMITS = (99, 163, 227)
SIZES = ((64, 77), (64, 129), (64, 197), (64, 257), (64, 577), (88, 129), (88, 257), (112, 129), (128, 129), (128, 257))


def registers() -> dict[str, int]:
    """Of each attention kernel for bfloat16, the more of two architectures."""
    found: dict[str, int] = {}
    for path in sorted(resources.harness.RESULTS.glob("resources-cuda-*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["family"] == "attention" and "bf16" in row["kernel"]:
                    found[row["kernel"]] = max(found.get(row["kernel"], 0), int(row["registers"]))
    return found


def launches(emulated, tokens: int, head_dim: int, limit: int) -> list[tuple[str, int, int]]:
    """Kernel, threads and shared memory of the blocks of one call forward and one backward."""
    q, k, v, out = torch.zeros(4, 1, tokens, 16, head_dim, dtype=torch.bfloat16)
    options = (None, None, None, 0, True, False, 1.0)
    op = torch.ops.evakernels

    def both() -> None:
        _, lse = op.attention(q, k, v, *options)
        op.attention_backward(out, q, k, v, out, lse, *options)

    with (
        mock.patch.dict(native.loaded, {"cpu": emulated}),
        mock.patch.object(native, "shared_memory", lambda _: limit * resources.KIB),
        ek.using("cuda"),
    ):
        made = emulated.launches(both)
    names = ("attention_forward_kernel", "attention_backward_keys_kernel", "attention_backward_queries_kernel")
    return [(name, threads, shared) for name, (_, threads, shared) in zip(names, made, strict=False)]


def main() -> None:
    emulated, held = native.load(Path(resources.built())), registers()
    print("| D | tokens | kernel | registers | " + " | ".join(f"{limit} KiB" for limit in LIMITS) + " |")
    print("|---|---|---|---|" + "---|" * len(LIMITS))
    for head_dim, tokens in SIZES:
        by_limit = [{name: launch for name, *launch in launches(emulated, tokens, head_dim, limit)} for limit in LIMITS]
        for kernel in dict.fromkeys(name for found in by_limit for name in found):
            used = held[f"{kernel}<bf16, {head_dim}>"]
            cells = []
            for found, limit in zip(by_limit, LIMITS, strict=True):
                if kernel not in found:
                    cells.append("none")
                    continue
                threads, shared = found[kernel]
                count = resources.blocks(used, threads, shared, limit * resources.KIB + resources.RESERVED)
                cells.append(f"{count} x {threads // 32} warps, {shared / resources.KIB:.0f} KiB")
            short = kernel.removeprefix("attention_").removesuffix("_kernel").replace("_", " by ", 1)
            print(f"| {head_dim} | {tokens} | {short} | {used} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
