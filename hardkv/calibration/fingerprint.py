"""A short hash of a model's weights, adapters included. It tells models apart whatever their names are."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The most values read per tensor, and the most tensors read per model.
VALUES, TENSORS = 64, 1024
# The distance of the values, modulo the tensor's size: a prime, so that they lie in all rows and columns.
STRIDE = 2_654_435_761


@torch.no_grad()
def fingerprint(model: nn.Module) -> str | None:
    """Return 16 hexadecimal digits that depend on the weights in use and on nothing else.

    It reads at most 64 values of each of at most 1,024 tensors, and waits once for each device. The digits are the same
    on every device, for every way in which accelerate spreads or offloads a model, and for every dtype that
    holds the checkpoint's values exactly. PEFT's adapters count while they are active, with their scale, under any
    name; a merged adapter counts through the weights that it changed.

    Returns:
        None if weights cannot be read: on the meta device, or gathered for a forward only.
    """
    found = list(_weights(model))
    samples = []  # shape and bits
    places: dict[Any, tuple[Tensor, ...]] = {}
    for stored in found[:: -(-len(found) // TENSORS) or 1]:
        # one after the other, since offloaded weights come into memory when they are read
        for tensor in _plain(stored if isinstance(stored, Tensor) else stored[0][stored[1]]):
            if tensor.is_meta:
                return None
            samples.append((str(tuple(tensor.shape)), _sample(tensor, places)))
    by_device: dict[torch.device, list[int]] = {}
    for at, (_, bits) in enumerate(samples):
        by_device.setdefault(bits.device, []).append(at)
    read: dict[int, Tensor] = {}
    for chosen in by_device.values():
        parts = [samples[at][1] for at in chosen]
        whole = torch.cat(parts).cpu()
        read |= zip(chosen, whole.split([len(part) for part in parts]), strict=True)
    known = {shape + read[at].numpy().tobytes().hex(): None for at, (shape, _) in enumerate(samples) if len(read[at])}
    # each once: tied weights may have several copies where they are offloaded
    return hashlib.sha256("\n".join([*known, *_scales(model)]).encode()).hexdigest()[:16] if known else None


def _sample(tensor: Tensor, places: "dict[Any, tuple[Tensor, ...]]") -> Tensor:
    """Return the bits of some values of a tensor, int32 `[n]` on its device; `places` holds indices by shape."""
    if tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)  # float8 cannot be indexed everywhere
    if tensor.dim() == 0:
        tensor = tensor[None]
    key = tensor.shape, tensor.device
    if key not in places:
        flat = torch.arange(min(tensor.numel(), VALUES), dtype=torch.int64, device=tensor.device)
        if tensor.numel() > VALUES:
            flat = flat * STRIDE % tensor.numel()
        indices = []
        for size in reversed(tensor.shape):
            indices.append(flat % max(size, 1))
            flat = flat // max(size, 1)
        places[key] = tuple(reversed(indices))
    values = tensor[places[key]]
    # both dtypes hold the values exactly
    return values.to(torch.float32 if values.is_floating_point() else torch.int64).view(torch.int32)


def _weights(model: nn.Module) -> "Iterator[Tensor | tuple[Mapping[str, Tensor], str]]":
    """Yield each parameter and persistent buffer in use, in the order of modules; offloaded ones as map and key.

    Buffers that are not persistent are left out: they are computed, and may change from one forward to the next.
    """
    unused = {id(tensor) for tensor in _inactive(model)}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        buffers = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in (module._parameters | buffers).items():
            if tensor is not None and id(tensor) not in unused:
                yield _offloaded(modules, path, name) or tensor.detach() if tensor.is_meta else tensor.detach()


def _offloaded(modules: dict[str, nn.Module], path: str, name: str) -> tuple[Mapping[str, Tensor], str] | None:
    """Return the map and key from which accelerate's hooks, the module's or an outer one's, load a meta tensor."""
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        key = ".".join([*parts[depth:], name])
        hook = getattr(modules[".".join(parts[:depth])], "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            stored = getattr(each, "weights_map", None)
            if stored is not None and key in stored:
                return stored, key
    return None


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a subclass (quantised, distributed) consists of, or a plain tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


# ---------------------------------------------------------------------- adapters, by attributes of PEFT's layers


def _adapted(model: nn.Module) -> Iterator[tuple[Any, list[str]]]:
    """Yield each layer with adapters, and the names of those that its forward adds to the weights."""
    layers: list[Any] = list(model.modules())
    for module in layers:
        if hasattr(module, "adapter_layer_names") and hasattr(module, "disable_adapters"):
            active: list[str] = [] if module.disable_adapters else module.active_adapters
            yield module, [name for name in active if name not in module.merged_adapters]


def _inactive(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers of the other adapters."""
    for module, used in _adapted(model):
        for kind in module.adapter_layer_names:
            for name, adapter in dict(getattr(module, kind, {})).items():
                if name not in used:
                    yield from [adapter] if isinstance(adapter, Tensor) else adapter.state_dict(keep_vars=True).values()


def _scales(model: nn.Module) -> Iterator[str]:
    """Yield the factors by which the outputs of adapters in use are multiplied."""
    for module, used in _adapted(model):
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):  # LoRA and its relatives
            yield from (str(float(scaling[name])) for name in used if name in scaling)
