"""Test linear layers with a common input, whose weights the compiled step reads as one."""

import copy

import pytest
import torch
import torch._inductor.config
from torch import nn

from hardkv.decoding import joined_linears


class Attention(nn.Module):
    """Projections of one input, with different widths, and a projection of their result."""

    def __init__(self, bias=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, width, bias=bias) for width in (12, 4, 4))
        self.o = nn.Linear(20, 8, bias=bias)

    def forward(self, x):
        return self.o(torch.cat([self.v(x), self.q(x), self.k(x)], -1))


def run(model, x):
    with joined_linears.watch(model), torch.no_grad():
        return model(x)


def joined(model, *names):
    """Whether the weights, and biases, of layers lie in one piece in the order of their calls."""
    modules = [model.get_submodule(name) for name in names]
    biases = [module.bias for module in modules if module.bias is not None]
    return joined_linears.adjacent([module.weight for module in modules]) and (
        not biases or joined_linears.adjacent(biases)
    )


def products(model, x):
    """How many matrix products the graph of a compiled forward has after the pass, and what it computes."""
    found = []

    def backend(module, inputs):
        joined_linears.JoinProducts()(module.graph)
        module.graph.lint()
        module.recompile()
        found.append(len(module.graph.find_nodes(op="call_function", target=nn.functional.linear)))
        return module.forward

    torch.compiler.reset()
    with torch.no_grad():
        out = torch.compile(model, backend=backend, fullgraph=True)(x)
    return found, out


@pytest.mark.parametrize("option", ["max_autotune", "max_autotune_gemm"])
def test_products_that_are_autotuned_stay_apart(option):
    """Inductor times them on copies of single parameters, which end where the next parameter begins."""
    model, x = Attention(), torch.randn(3, 1, 8)
    expected = run(model, x)
    assert joined_linears.join(model)
    with torch._inductor.config.patch({option: True}), pytest.warns(UserWarning, match="autotunes"):
        found, out = products(model, x)
    assert found == [4]
    torch.testing.assert_close(out, expected)
    assert products(model, x)[0] == [2]


@pytest.mark.parametrize("bias", [False, True])
def test_one_product(bias):
    torch.manual_seed(0)
    model, x = Attention(bias), torch.randn(3, 1, 8)
    held = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    expected = run(model, x)
    assert products(model, x)[0] == [4]  # apart in memory, apart in the graph
    assert joined_linears.join(model)
    assert joined(model, "v", "q", "k")
    found, out = products(model, x)
    assert found == [2]
    torch.testing.assert_close(out, expected)
    after = dict(model.named_parameters())
    assert all(after[name] is held[name] and torch.equal(after[name], before[name]) for name in held)
    storages = {parameter.untyped_storage()._cdata: parameter.untyped_storage().nbytes() for parameter in held.values()}
    assert sum(storages.values()) == sum(parameter.nbytes for parameter in held.values())
    assert not joined_linears.join(model)  # nothing is moved twice


def test_join_again_after_a_move():
    model, x = Attention(), torch.randn(2, 1, 8)
    run(model, x)
    joined_linears.join(model)
    model.double().float()
    assert not joined(model, "v", "q", "k")
    assert joined_linears.join(model)
    assert joined(model, "v", "q", "k")
    twin = copy.deepcopy(model)  # whose parameters lie apart again
    assert joined_linears.join(twin)
    assert joined(twin, "v", "q", "k")
    assert joined(model, "v", "q", "k")


def test_what_changed_since():
    """A layer of another dtype is left alone; one whose weight was put elsewhere is brought back."""
    model, x = Attention(), torch.randn(2, 1, 8)
    run(model, x)
    model.k.double()
    assert not joined_linears.join(model)
    assert model.q.weight.dtype == torch.float32
    model.k.float()
    joined_linears.join(model)
    other = torch.randn(9, 8)
    model.k.weight.data = other[5:]
    assert joined_linears.join(model)
    assert joined(model, "v", "q", "k")
    assert torch.equal(model.k.weight, other[5:])


def test_gradients_still_flow():
    model, x = Attention(), torch.randn(2, 1, 8)
    run(model, x)
    with torch.inference_mode():
        joined_linears.join(model)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Two(nn.Module):
    """Two layers, `a` and `b`, that read one input."""

    def __init__(self, a, b, calls=("a", "b")):
        super().__init__()
        self.a, self.b, self.calls = a, b, calls

    def forward(self, x):
        return torch.cat([getattr(self, name)(x).float() for name in self.calls], -1)


def tied():
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    return Two(a, b)


def part():
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight.data = torch.randn(16, 8)[8:]  # of memory that others may read
    return Two(a, b)


class Scaled(nn.Linear):
    """A custom linear layer."""


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(tied, id="one parameter"),
        pytest.param(part, id="a part of other memory"),
        pytest.param(lambda: Two(nn.Linear(8, 4), nn.Linear(8, 4, bias=False)), id="one bias"),
        pytest.param(lambda: Two(nn.Linear(8, 4), Scaled(8, 4)), id="a subclass"),
        pytest.param(lambda: Two(nn.Linear(8, 4), nn.Linear(8, 4), ("a", "a")), id="called twice"),
    ],
)
def test_left_apart(make):
    model, x = make(), torch.randn(2, 1, 8)
    expected = run(model, x)
    assert not joined_linears.join(model)
    torch.testing.assert_close(products(model, x)[1], expected)


def test_shared_by_two_groups():
    """A layer that reads one input with one sibling and another input with another: the first group has it."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            y = self.a(x) + self.b(x)
            return self.b(y) + self.c(y)

    model, x = Shared(), torch.randn(2, 1, 8)
    expected = run(model, x)
    assert joined_linears.join(model)
    assert joined(model, "a", "b")
    assert not joined_linears.join(model)
    found, out = products(model, x)
    assert found == [3]
    torch.testing.assert_close(out, expected)
