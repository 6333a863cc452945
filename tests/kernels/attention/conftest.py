"""Replace the FlashAttention packages that hardkv finds by none, or by fakes."""

import sys
from types import ModuleType

import pytest
import torch

from hardkv.kernels.attention.packages import PACKAGES, installed
from tests.kernels.attention.fake_packages import FAKES


@pytest.fixture
def install(monkeypatch):
    """Return `install(package, contents)`, which installs a fake module; no package is installed at first."""

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
    """Install one fake package; return its name, and the bounds on queries per sequence of its calls."""
    package, calls = request.param.split()[0], []
    install(package, FAKES[request.param](calls))
    return package, calls
