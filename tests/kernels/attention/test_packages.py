"""Test which package attends (the first installed one that supports the inputs), and the message when none does."""

import sys
import warnings

import pytest
import torch

from hardkv.kernels.attention.packages import PACKAGES, installed, resolve_package
from tests.kernels.attention.fake_packages import FAKES, flash_attn_4, torch_varlen


class TestInstalled:
    def test_nothing(self, install):
        assert installed() == ()

    def test_order_of_preference(self, install):
        for package in ("torch_varlen", "flash_attn_4", "flash_attn_2", "flash_attn_3"):
            install(package, FAKES[package]([]))
        assert installed() == tuple(PACKAGES) == ("flash_attn_3", "flash_attn_2", "flash_attn_4", "torch_varlen")

    @pytest.mark.parametrize("error", [ImportError("undefined symbol"), OSError("no such file"), RuntimeError("ABI")])
    def test_broken_package_is_warned_of_once(self, install, monkeypatch, tmp_path, error):
        install("torch_varlen", torch_varlen([]))
        (tmp_path / "flash_attn.py").write_text(f"raise {error!r}")
        monkeypatch.delitem(sys.modules, "flash_attn")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.warns(UserWarning, match="flash_attn_2 is installed but cannot be imported") as warned:
            assert installed() == ("torch_varlen",)
        assert len(warned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert installed() == ("torch_varlen",)

    def test_namespace_that_another_package_left(self, install):
        """FlashAttention-4 is installed as `flash_attn.cute`, which leaves an empty `flash_attn` namespace."""
        install("flash_attn_2", {})
        install("flash_attn_4", flash_attn_4([]))
        assert installed() == ("flash_attn_4",)

    @pytest.mark.parametrize("package", ["flash_attn_2", "flash_attn_4", "torch_varlen"])
    def test_version_before_those_supported(self, install, package):
        """Try FlashAttention-2 without softcap, a preview of FlashAttention-4 without lse, and PyTorch 2.10."""
        install(package, {PACKAGES[package].function: lambda q, k, v, causal=False: None})
        assert installed() == ()

    def test_pytorch_without_its_kernel(self, install, monkeypatch):
        install("torch_varlen", torch_varlen([]))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        assert installed() == ()


class TestResolvePackage:
    def put(self, install, *packages):
        for package in packages:
            install(package, FAKES[package]([]))

    def test_first_that_can(self, install):
        self.put(install, *PACKAGES)
        assert resolve_package(None, torch.bfloat16, 128, 128, None) == "flash_attn_3"
        assert resolve_package(None, torch.bfloat16, 128, 64, None) == "flash_attn_4"
        assert resolve_package("torch_varlen", torch.bfloat16, 128, 128, None) == "torch_varlen"

    def test_unknown(self, install):
        with pytest.raises(ValueError, match="package='flash' is not known. Allowed: None, 'flash_attn_3'"):
            resolve_package("flash", torch.bfloat16, 128, 128, None)

    def test_not_installed(self, install):
        with pytest.raises(ValueError, match="package=None is not installed; installed: none. Install one"):
            resolve_package(None, torch.bfloat16, 128, 128, None)
        self.put(install, "torch_varlen")
        with pytest.raises(ValueError, match="package='flash_attn_2' is not installed; installed: 'torch_varlen'"):
            resolve_package("flash_attn_2", torch.bfloat16, 128, 128, None)

    @pytest.mark.parametrize(
        ("package", "inputs", "message"),
        [
            (
                "flash_attn_2",
                (torch.float32, 128, 128, None),
                "takes torch.float16 and torch.bfloat16, .*dtype=torch.float32",
            ),
            ("flash_attn_2", (torch.float16, 12, 12, None), "multiples of 8 up to 256, but one is 12"),
            ("flash_attn_3", (torch.float16, 264, 264, None), "multiples of 8 up to 256, but one is 264"),
            ("flash_attn_4", (torch.float16, 64, 0, None), "multiples of 8 up to 256, but one is 0"),
            ("flash_attn_2", (torch.float16, 192, 128, None), "keys have 192 and values 128 dimensions"),
            ("flash_attn_3", (torch.float16, 192, 128, None), "keys have 192 and values 128 dimensions"),
            ("torch_varlen", (torch.float16, 128, 128, 30.0), "has no softcap, but softcap=30.0"),
        ],
        ids=str,
    )
    def test_refusals(self, install, package, inputs, message):
        self.put(install, package)
        for named in (package, None):
            with pytest.raises(ValueError, match=f"{package}.*{message}.* attention='torch'"):
                resolve_package(named, *inputs)
