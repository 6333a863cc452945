"""Objects that replace keys, values and masks. Only hardkv's attention can read them.

Any other code that uses them gets an `UnroutedKVError` instead of wrong attention.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from hardkv.cache.routing.call import AttentionCall


class UnroutedKVError(RuntimeError):
    """Keys, values or the mask of a HardKVCache reached code that does not know them."""


def unrouted(what: str, name: str) -> NoReturn:
    raise UnroutedKVError(
        f"{name!r} was used on the {what} of a HardKVCache, so this model's attention did not go through the attention "
        "functions that hardkv wraps. Load the model with attn_implementation='sdpa', and build a new "
        "HardKVCache(config=model.config) after anything else has registered attention functions. If that is so "
        "already, this architecture has attention code of its own or changes keys and values between cache and "
        "attention, and is not supported: use DynamicCache."
    )


def _refusal(name: str) -> Callable[..., NoReturn]:
    def method(self: "Opaque", *args: Any, **kwargs: Any) -> NoReturn:
        unrouted(self.what, name)

    return method


class Opaque:
    """Refuse any computation: attributes, indexing, operators and torch functions raise UnroutedKVError."""

    what: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # copy, pickle and dynamo probe for protocols
        unrouted(self.what, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        unrouted(cls.what, getattr(func, "__name__", str(func)))


for _operator in (
    *("getitem", "setitem", "len", "iter", "neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "bool", "float"),
    *(
        prefix + name
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
        for prefix in ("", "r", "i")
    ),
):
    setattr(Opaque, f"__{_operator}__", _refusal(f"__{_operator}__"))


class HeldStates(Opaque):
    """The `keys` or `values` that a HardKV layer shows to other code: only shape, dtype and device."""

    what = "keys or values"

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        self.shape = shape
        self.dtype = dtype
        self.device = device

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> "torch.Size | int":
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class NewKV(Protocol):
    """The new keys and values that a handle stands for."""

    latent: bool
    given: tuple[Tensor, Tensor]

    @property
    def stop(self) -> int:
        """Columns that the handle shows."""
        ...

    def attend(self, call: AttentionCall) -> tuple[Any, Any]:
        """Attend over these and all earlier tokens."""
        ...


class KVHandle(HeldStates):
    """What `update()` returns in place of keys or values: shape, dtype and device, but no data.

    It is a plain object, because torch.compile cannot trace a Tensor subclass through here.
    """

    requires_grad = False

    def __init__(self, new: NewKV, like: Tensor):
        super().__init__(torch.Size((*like.shape[:2], new.stop, like.shape[3])), like.dtype, like.device)
        self.new = new

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    # A handle has no data, so moving it to a device (accelerate's hooks) or changing its memory layout does nothing.
    def to(self, *args: Any, **kwargs: Any) -> "KVHandle":
        return self

    def contiguous(self, *args: Any, **kwargs: Any) -> "KVHandle":
        return self


class LatentHandle(KVHandle):
    """The handle of a latent that the model expands to keys and values before attention. It accepts one linear map."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handle, bias = args[0], (kwargs or {}).get("bias", args[2] if len(args) > 2 else None)
        if func is torch.nn.functional.linear and isinstance(handle, KVHandle) and bias is None:
            return ExpandedHandle(handle, args[1] if len(args) > 1 else (kwargs or {})["weight"])
        return super().__torch_function__(func, types, args, kwargs)

    def expand(self, *args: Any, **kwargs: Any) -> "ExpandedHandle":
        return ExpandedHandle(self)


class ExpandedHandle(KVHandle):
    """The handle of a latent after the model's `expand_kv`. The model may rearrange the heads but not compute further.

    Args:
        latent: the handle that was expanded. weight: of the linear map, `[out, C]`; None: only repeated.
    """

    def __init__(self, latent: KVHandle, weight: Tensor | None = None):
        HeldStates.__init__(self, latent.shape, latent.dtype, latent.device)
        self.new = latent.new
        self.weight = weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.split:
            return (args[0],) * len(args[1])
        return super().__torch_function__(func, types, args, kwargs)

    def _same(self, *args: Any, **kwargs: Any) -> "ExpandedHandle":
        return self

    view = transpose = new_empty = __getitem__ = copy_ = _same


class UnmaskedLength(int):
    """A number of columns for which attention reads no mask."""


class LogicalLen(int):
    """The key length of a HardKV layer. It travels from `get_mask_sizes` to the mask function."""

    layer_idx: int

    def __new__(cls, length: int, layer_idx: int) -> "LogicalLen":
        self = super().__new__(cls, length)
        self.layer_idx = layer_idx
        return self
