"""One matrix product for linear layers that read the same input, such as query, key and value, or gate and up.

A decode step reads every weight for only a few tokens, so a small product costs little more than its launch and the
start of its memory traffic. The weights of such siblings are moved next to each other, so that one product reads them
all. They keep their values, names and shapes, and nothing is stored twice.
"""

import operator
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

# The attribute of a model that lists its siblings once `watch` has found them.
SIBLINGS = "_hardkv_siblings"


@contextmanager
def watch(model: nn.Module) -> Iterator[None]:
    """Note which plain linear layers of a model read the same tensor in the forward that runs inside this block."""
    readers: dict[int, tuple[Any, list[nn.Linear]]] = {}  # by the input's id; it must stay alive to keep it

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs:
            readers.setdefault(id(inputs[0]), (inputs[0], []))[1].append(cast(nn.Linear, module))

    hooks = [each.register_forward_pre_hook(note) for each in model.modules() if type(each) is nn.Linear]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    found, taken = [], set[Tensor]()
    for _, modules in readers.values():
        weights: list[Tensor] = [module.weight for module in modules]
        free = all(map(_alone, weights)) or adjacent(weights)
        if free and taken.isdisjoint(weights) and _can_join(modules):
            found.append(modules)
            taken.update(weights)
    setattr(model, SIBLINGS, found)


def _can_join(modules: list[nn.Linear]) -> bool:
    """Return whether linear layers are of one kind, so that one product can replace theirs."""
    weights = [module.weight for module in modules]
    biases = [module.bias for module in modules if module.bias is not None]
    kinds = {(each.dtype, each.device, each.shape[1:]) for each in weights}
    return (
        len(modules) > 1
        and len(set(weights)) == len(modules)  # no layer is called twice
        and len(kinds) == 1
        and len(biases) in (0, len(modules))
        and all(type(each.data) is Tensor for each in (*weights, *biases))  # neither quantised nor sharded
    )


def _alone(tensor: Tensor) -> bool:
    """Return whether a tensor fills its whole storage."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def adjacent(tensors: list[Any]) -> bool:
    """Return whether tensors fill one storage from its start, one after the other."""
    end = 0
    for tensor in tensors:
        same = tensor.untyped_storage()._cdata == tensors[0].untyped_storage()._cdata
        if not (same and tensor.is_contiguous() and tensor.storage_offset() == end):
            return False
        end += tensor.numel()
    return True


@torch.no_grad()
def join(model: nn.Module) -> bool:
    """Move the parameters of siblings that `watch` found next to each other. Return whether any moved.

    The model must not be in use: a forward or graph that runs meanwhile reads memory that is freed.
    """
    moved = None
    for modules in filter(_can_join, getattr(model, SIBLINGS, ())):
        for name in ("weight", "bias"):
            held = [getattr(module, name) for module in modules]
            if held[0] is None or adjacent(held):
                continue
            with torch.inference_mode(False):
                home = torch.cat([each.data for each in held])
            for each, part in zip(held, home.split([len(each) for each in held]), strict=True):
                each.data = part
            moved = home
    if moved is not None and moved.device.type == "cuda":
        torch.cuda.empty_cache()  # the old pieces are too small for tensors as large as this
    return moved is not None


class JoinProducts(CustomGraphPass):
    """An inductor pass that joins the products of adjacent weights with one input."""

    def __call__(self, graph: Graph) -> None:
        if config.max_autotune or config.max_autotune_gemm:  # autotuning tries products on copies of single parameters
            warnings.warn(
                "inductor autotunes matrix products (max_autotune): the compiled step keeps those of one input apart",
                stacklevel=2,
            )
            return
        readers = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=nn.functional.linear):
            readers[node.args[0]].append(node)
        for nodes in readers.values():
            weights = [_argument(node, 1, "weight") for node in nodes]
            biases = [_argument(node, 2, "bias") for node in nodes]
            bare = all(each is None for each in biases)
            if len(nodes) > 1 and _lie_together(weights) and (bare or _lie_together(biases)):
                _merge(graph, nodes, weights, None if bare else biases)

    def uuid(self) -> bytes:
        """Return the key under which compiled code is cached."""
        return get_hash_for_files((__file__,))


def _argument(node: Node, at: int, name: str) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name)


def _lie_together(nodes: list[Any]) -> bool:
    """Return whether a graph's inputs are `adjacent`."""
    inputs = all(isinstance(node, Node) and node.op == "placeholder" for node in nodes)
    return inputs and adjacent([node.meta["example_value"] for node in nodes])


def _merge(graph: Graph, nodes: list[Node], weights: list[Node], biases: list[Node] | None) -> None:
    sizes = [len(weight.meta["example_value"]) for weight in weights]
    total, width = sum(sizes), weights[0].meta["example_value"].shape[1]
    with graph.inserting_before(nodes[0]):
        weight = graph.call_function(torch.as_strided, (weights[0], (total, width), (width, 1)))
        bias = biases and graph.call_function(torch.as_strided, (biases[0], (total,), (1,)))
        product = graph.call_function(nn.functional.linear, (nodes[0].args[0], weight, bias))
        parts = graph.call_function(torch.split, (product, sizes, -1))
        for i, node in enumerate(nodes):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (parts, i)))
    for node in nodes:
        graph.erase_node(node)
