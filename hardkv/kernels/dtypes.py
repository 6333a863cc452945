"""The dtypes that arithmetic runs in."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for softmax and sums: float64 for a float64 model, else float32."""
    return torch.promote_types(dtype, torch.float32)
