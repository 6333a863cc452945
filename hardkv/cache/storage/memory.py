"""Bytes that tensors keep alive."""

from collections.abc import Iterable

from torch import Tensor


def storage_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each once: a view counts as all that it keeps alive."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
