"""Values for parameters of which each process may hold a part."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that all have, sharded as another of its shape; where that is whole, all.

    Nothing is exchanged.
    """
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
