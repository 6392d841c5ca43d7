"""What GPUs are rated at: datasheets, none of it measured here."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU in a server of eight."""

    name: str  # a part of what the driver calls it
    rate: float  # FLOP/s of dense bfloat16 matrix products
    rate_fp32: float  # the same in float32, without tensor cores
    memory: float  # bytes
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to its neighbours in the server, one way
    network: float  # bytes/s between servers, all eight adapters of one together, one way
    per_server: int = 8


GIB = 1024**3
GPUS = {
    "a100-40g": Gpu(
        name="A100-SXM4-40GB", rate=312e12, rate_fp32=19.5e12, memory=40 * GIB, bandwidth=1.555e12, link=300e9,
        network=200e9,
    ),
    "a100-80g": Gpu(
        name="A100-SXM4-80GB", rate=312e12, rate_fp32=19.5e12, memory=80 * GIB, bandwidth=2.039e12, link=300e9,
        network=200e9,
    ),
    "h100": Gpu(
        name="H100 80GB HBM3", rate=989.4e12, rate_fp32=67e12, memory=80 * GIB, bandwidth=3.35e12, link=450e9,
        network=400e9,
    ),
    "h200": Gpu(
        name="H200", rate=989.4e12, rate_fp32=67e12, memory=141e9, bandwidth=4.8e12, link=450e9, network=400e9
    ),
}  # fmt: skip


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU that the driver calls so, if its ratings are known."""
    return next((gpu for gpu in GPUS.values() if gpu.name in device_name), None)
