"""Lets torchvision, which timm and open_clip import, be imported beside a CPU build of torch."""

import torch

if torch.version.cuda is None:
    # torchvision's wheel registers fake kernels for two operators of a CUDA library that cannot load here, and
    # fails to import where they are undeclared.
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _op in ("nms", "qnms"):
        _torchvision.define(f"{_op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
