"""Test `import hardkv`: which modules it imports, what it leaves unchanged, and its public names."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

import hardkv
from hardkv.cache.argument import CACHE

# Run in a fresh interpreter that has not imported hardkv yet.
CHILD = """
import json, sys
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers import StaticCache
import transformers.cache_utils, transformers.generation, transformers.masking_utils, transformers.modeling_utils

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
CACHE = sys.argv[1]  # what this version calls a cache

def outputs():
    found = []
    for attn in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=2, eos_token_id=None, pad_token_id=0, attn_implementation=attn,
        )
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(1, 64, (2, 9))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=16), None):
            out = model.generate(
                ids, attention_mask=mask, **{CACHE: cache}, max_new_tokens=5, do_sample=False,
                return_dict_in_generate=True, output_logits=True, output_attentions=attn == "eager",
            )
            found += [out.sequences, *out.logits]
            found += [weights for layers in out.attentions or () for weights in layers]
        model.train()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        found += [parameter.grad for parameter in model.parameters()]
        found.append(config._attn_implementation)
    return found

before = outputs()


def settings():
    return [
        torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype()), torch.initial_seed(),
        torch.random.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled(),
        transformers.logging.get_verbosity(), torch.cuda.is_initialized(),
    ]

loaded, settings_before = set(sys.modules), settings()

import hardkv

result = {"new": sorted(set(sys.modules) - loaded), "settings": settings() == settings_before}
after = outputs()
result["same"] = len(before) == len(after) and all(
    torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, after)
)
names = AttentionInterface._global_mapping
hardkv.HardKVCache()
result["wrapped"] = all(hasattr(names[name], "_hardkv") for name in names if not name.startswith("paged|"))
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def child():
    """Return the effects of `import hardkv` in a fresh interpreter."""
    run = subprocess.run([sys.executable, "-c", CHILD, CACHE], capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_brings_nothing_optional(child):
    """Beyond torch and transformers, import only hardkv itself and the standard library."""
    packages = {name.partition(".")[0] for name in child["new"]}
    assert "hardkv" in packages
    assert packages - set(sys.stdlib_module_names) <= {"hardkv", "torch", "transformers"}
    # lazily loaded parts of transformers must not import a model or an integration either
    assert not [name for name in child["new"] if name.startswith("transformers.models.")]


def test_importing_leaves_out_the_rooms_that_need_more(child):
    """Programs, demos and pictures are imported only by those who run them."""
    assert not [name for name in child["new"] if name.split(".")[:2] in (["hardkv", "viz"], ["hardkv", "cli"])]


def test_importing_leaves_global_settings_alone(child):
    assert child["settings"]


def test_models_without_a_hardkv_cache_compute_the_very_same(child):
    assert child["same"]


def test_importing_wraps_the_registries(child):
    assert child["wrapped"]


def test_public_names():
    assert sorted(hardkv.__all__) == sorted(set(hardkv.__all__))
    for required in ("HardKVCache", "HardKVConfig"):
        assert required in hardkv.__all__


def test_version():
    assert hardkv.__version__.split(".")[0].isdigit()
    try:
        installed = importlib.metadata.version("hardkv")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("hardkv is not installed, only on the path")
    assert installed == hardkv.__version__
