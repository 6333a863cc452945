"""Tensor parallelism: which of a layer's KV heads this process computes."""

import torch


def local_heads(module: torch.nn.Module, total: int, local: int) -> tuple[int, int]:
    """Return the first head, and the one after the last, that this process's part of an attention module computes.

    Heads are split in rank order along the mesh that shards the module's parameters.

    Args:
        module: the attention module. total, local: KV heads of the whole layer and of the keys that came.

    Raises:
        ValueError: the module's parameters are not sharded into parts of that many heads.
    """
    ranks = total // local
    if ranks * local == total and torch.distributed.is_available():
        from torch.distributed.tensor import DTensor, Shard  # torch may be built without it

        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                continue
            mesh = parameter.device_mesh
            for dim, placement in enumerate(parameter.placements):
                if isinstance(placement, Shard) and mesh.size(dim) == ranks:
                    first = mesh.get_local_rank(dim) * local
                    return first, first + local
    raise ValueError(
        f"{type(module).__name__} brings {local} KV heads and the calibration has {total} a layer, but the module's "
        f"parameters are not sharded (as DTensors) into {total / local:g} equal parts, so it is unknown which heads "
        "these are: load the model by transformers' own tensor parallelism over a number of processes that divides the "
        "heads, or pass calibration=None"
    )
