"""What every test shares: the `gpu` mark, and a torchvision that imports beside a CPU build of torch."""

import pytest
import torch

torch.set_num_threads(1)  # the tensors here are small, and tests may run side by side

if torch.version.cuda is None:
    # torchvision's wheel registers fake kernels for two operators of a CUDA library that cannot load here, and
    # fails to import where they are undeclared; timm and open_clip, our peers in tests, import it.
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _op in ("nms", "qnms"):
        _torchvision.define(f"{_op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch.cuda.is_available() is False")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
