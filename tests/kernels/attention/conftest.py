"""Which FlashAttention packages are installed, as far as hardkv looks: none, or fakes."""

import sys
from types import ModuleType

import pytest
import torch

from hardkv.kernels.attention.packages import PACKAGES, installed
from tests.kernels.attention.fake_packages import FAKES


@pytest.fixture
def install(monkeypatch):
    """`install(package, contents)` puts a module where the package is looked for; nothing is installed at first."""

    def put(package, contents):
        module = ModuleType(PACKAGES[package].module)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, PACKAGES[package].module, module)
        installed.cache_clear()

    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package.module, None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    installed.cache_clear()
    yield put
    installed.cache_clear()


@pytest.fixture(params=FAKES)
def fake(request, install):
    """The only package installed: its name, and its calls' bounds on the queries of a sequence."""
    package, calls = request.param.split()[0], []
    install(package, FAKES[request.param](calls))
    return package, calls
