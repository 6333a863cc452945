"""Count the bytes that tensors keep alive."""

from collections.abc import Iterable

from torch import Tensor


def storage_nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind `tensors`, each storage once. A view counts as its whole storage."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
