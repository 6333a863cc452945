"""Notice when a further `generate()` does not continue the tokens that its cache holds."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class HeldIds:
    """The token ids of the columns that a cache held when a `generate()` returned, int64 `[B, columns]` on the CPU."""

    ids: Tensor

    @classmethod
    def of(cls, result: Any, columns: int) -> "HeldIds | None":
        """Read them from what `generate()` returned; None if that does not have all of the `columns` held."""
        ids = getattr(result, "sequences", result)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not columns <= ids.shape[1] <= columns + 1:
            return None  # such as new tokens only, after inputs_embeds
        return cls(ids[:, :columns].to("cpu", copy=True))

    def check(self, ids: Any, mask: Any) -> None:
        """Compare with the ids and the attention mask of the next `generate()`, where the mask shows tokens.

        Raises:
            ValueError: a token differs.
        """
        rows, columns = self.ids.shape
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] < columns:
            return
        if mask is not None and mask.shape != ids.shape:  # the ids are new ones only
            return
        differ = ids[:, :columns].cpu() != self.ids
        if mask is not None:
            differ &= mask[:, :columns].cpu().bool()
        if differ.any():
            row, column = differ.nonzero()[0].tolist()
            got, held = int(ids[row, column]), int(self.ids[row, column])
            raise ValueError(
                f"generate() goes on with a HardKVCache that holds {columns} columns, and input_ids have other tokens: "
                f"in column {column} of sequence {row}, {got} instead of {held}. A tokenizer may cut a decoded answer "
                "into other tokens: append the new ids to what generate() returned, torch.cat([out, new_ids], 1), or "
                "reset() the cache"
            )
