"""What rank 0 does for all ranks, and what all ranks give to rank 0."""

from collections.abc import Callable
from typing import Any

import torch
from composer.utils import dist
from torch import Tensor
from torch.distributed import ProcessGroup


def on_rank_0(function: Callable[[], Any], group: ProcessGroup | None = None) -> Any:
    """Call a function on rank 0 alone; return its result, or raise its error, on all ranks."""
    result = error = None
    if dist.get_global_rank() == 0:
        try:
            result = function()
        except (ValueError, OSError) as raised:  # the other ranks wait for an answer
            error = raised
    answer = [result, error]
    dist.broadcast_object_list(answer, group=group)
    result, error = answer
    if error is not None:
        raise error
    return result


def interleave_on_rank_0(share: Tensor) -> Tensor:
    """Return the rows of all ranks' shares (n, ...) in turn on rank 0, and no rows on others."""
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    if ranks == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(ranks)] if rank == 0 else None
    torch.distributed.gather(share, shares)
    return torch.stack(shares, dim=1).flatten(0, 1) if rank == 0 else share[:0]
