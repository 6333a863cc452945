"""Describe the hardware and software of measurements, in the forms that the JSON files use."""

import os
import platform
from importlib import metadata
from typing import Any

import torch
import transformers

import hardkv


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def one_line() -> str:
    """Return the current GPU or the number of CPU cores, and the versions of torch and transformers."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


def with_versions(device: torch.device) -> dict[str, str]:
    """Return a device's name, and the versions of Python, torch and transformers."""
    return {
        "machine": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def gpu(device: torch.device) -> dict[str, str]:
    """Return a GPU's name, and the versions of hardkv and of the packages for decoding."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "triton")}
    return {"gpu": torch.cuda.get_device_name(device), "hardkv": hardkv.__version__, **versions}


def cpu() -> dict[str, Any]:
    """Return the CPU's architecture, torch's number of threads, the number of cores, and torch's version."""
    return {
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
