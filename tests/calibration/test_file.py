"""Calibrations on disk, and in the configs and caches that use them."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from hardkv import Calibration, HardKVCache, HardKVConfig
from hardkv.cache.argument import CACHE
from hardkv.cache.model import Traits
from hardkv.selectors import AdaKV, Adaptive, Attention, Pyramid, Risk, SnapKV, TopK, TopP

HEADS = 2
TINY = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 1024,
}
# of `make`
SETTINGS = {"scorer": "attention", "window": 8, "sinks": 2}
TENSORS = ["temperatures", "residuals", "counts", "risk", "kept", "key_means", "value_means", "distortion"]


def make(config=None, layers=(0, 1, 2), **changes):
    """A calibration for a model of `config`, `SETTINGS`."""
    config = LlamaConfig(**TINY) if config is None else config
    generator = torch.Generator().manual_seed(0)
    shape = (len(layers), HEADS)
    values = {
        "temperatures": torch.rand(shape, generator=generator) * 3 + 0.1,
        "residuals": torch.rand(shape, generator=generator),
        "counts": torch.tensor([10, 20, 40, 100, 200]),
        "risk": torch.rand(*shape, 5, generator=generator).cumsum(-1).flip(-1) * torch.tensor([1, 1, 1, 1, 0]),
        "kept": torch.randint(0, 200, (3, *shape), generator=generator),
        "key_means": torch.rand(*shape, 8, generator=generator),
        "value_means": torch.rand(*shape, 8, generator=generator),
        "distortion": torch.rand(*shape, 2, 4, generator=generator),
        "provenance": {
            "name": Traits.of(config).name,
            "geometry": Traits.of(config).geometry,
            "weights": "0123456789abcdef",
            "layers": list(layers),
            **SETTINGS,
            "scorer": {"name": SETTINGS["scorer"]},
            "interval": 16,
            "p": 0.9,
            "length": 200,
            "versions": {"torch": torch.__version__},
        },
    }
    return Calibration(**values | changes)


def temperatures_only(**changes):
    return make(counts=None, risk=None, kept=None, key_means=None, value_means=None, distortion=None, **changes)


def bits(tensor):
    """What a tensor holds, NaN and the sign of 0 included."""
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).tolist())


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("absent", [(), ("kept",), ("counts", "risk"), ("counts", "risk", "kept")], ids=str)
def test_a_file_gives_back_every_bit(absent, tmp_path):
    calibration = make(**dict.fromkeys(absent))
    calibration.temperatures = torch.tensor([[1e-4, -0.0, 3e-45], [torch.pi, torch.nan, 1e4]]).T  # not contiguous
    calibration.provenance["name"] = "café/模型"
    path = tmp_path / "new" / "folder" / "c.safetensors"
    assert calibration.save(path) == path
    assert calibration.path == path
    again = Calibration.load(str(path))
    assert {name: bits(getattr(again, name)) for name in TENSORS} == {
        name: bits(getattr(calibration, name)) for name in TENSORS
    }
    assert [name for name in TENSORS if getattr(again, name) is None] == [name for name in TENSORS if name in absent]
    assert again.provenance == calibration.provenance
    assert again.path == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_every_field_is_saved():
    assert {field.name for field in fields(Calibration)} == {*TENSORS, "provenance", "path"}


def test_missing_files_are_told(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no calibration at .*hardkv.calibrate"):
            Calibration.load(path)
        with pytest.raises(FileNotFoundError, match=r"there is no calibration at"):
            HardKVConfig(budget=64, calibration=path)


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04" + bytes(100), "half"], ids=str)
def test_files_of_another_kind_are_refused(content, tmp_path):
    path = tmp_path / "c.safetensors"
    if content == "half":
        content = make().save(path).read_bytes()[:-100]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.safetensors' is not a calibration file"):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (["weight"], None),
        (["weight"], {"format": "pt"}),
        (["weight"], {"format": "1", "provenance": "{}"}),
        (["temperatures"], {"format": "1", "provenance": "{}"}),
        (["temperatures", "residuals"], {"format": "0", "provenance": "{}"}),
    ],
)
def test_safetensors_of_something_else_are_refused(tensors, metadata, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(2, 2) for name in tensors}, path, metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors' is not a calibration file of this version"):
        Calibration.load(path)


def test_provenance_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file(make()._tensors(), path, {"format": "1", "provenance": "{"})
    with pytest.raises(ValueError, match=r"c\.safetensors' is not a calibration file"):
        Calibration.load(path)


@pytest.mark.parametrize("scorer", ["attention", "snapkv", "rkv"])
def test_files_of_earlier_versions_are_read(scorer):
    """They hold a hash of the config, and nothing of the weights."""
    folder = Path(__file__).parents[2] / "eval" / "reasoner" / "model"
    calibration = Calibration.load(folder / f"calibration-{scorer}.safetensors")
    assert ("config_hash" in calibration.provenance, "weights" in calibration.provenance) == (True, False)
    config = AutoConfig.from_pretrained(folder)
    cache = HardKVCache(config=config, scorer=scorer, budget=64, calibration=calibration)
    assert cache.stats().calibration == f"{calibration.path}, of 'eval/reasoner/model'"
    assert cache.stats().warnings == []


@pytest.mark.parametrize("old", [False, True], ids=["new file", "old file"])
def test_half_a_file_never_has_the_final_name(old, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    if old:
        make().save(path)
    before = path.read_bytes() if old else None

    def fail(file):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    calibration = temperatures_only()
    with pytest.raises(OSError, match="no space left"):
        calibration.save(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if old else [])
    assert calibration.path is None


def test_curves_are_made_once_and_only_from_risk():
    calibration = make()
    assert calibration.curves is calibration.curves
    assert torch.equal(calibration.curves.loss, calibration.risk)
    with pytest.raises(ValueError, match=r"no risk curves.*hardkv.calibrate"):
        temperatures_only().curves  # noqa: B018


# ---------------------------------------------------------------------- does it fit


def test_the_same_settings_and_model_fit():
    calibration = make()
    calibration.check_settings(Attention(), 8)
    assert calibration.check_model(LlamaConfig(**TINY), [0, 1, 2]) is None


@pytest.mark.parametrize(
    ("scorer", "window", "match"),
    [
        (SnapKV(), 8, r"scorer .*\"attention\".* here, .*\"snapkv\".* in the cache"),
        (Attention(), 9, r"\(window 8 here, 9 in the cache\)"),
        (SnapKV(), 9, r"scorer.*; window 8 here, 9"),
    ],
)
def test_other_settings_are_named(scorer, window, match):
    with pytest.raises(ValueError, match=match):
        make().check_settings(scorer, window)


def test_a_parameter_of_the_scorer_counts():
    calibration = make()
    calibration.provenance["scorer"] = HardKVConfig(scorer="snapkv").to_dict()["scorer"]
    calibration.check_settings(SnapKV(), 8)
    with pytest.raises(ValueError, match=r"\"kernel_size\": 7.* here, .*\"kernel_size\": 5.* in the cache"):
        calibration.check_settings(SnapKV(kernel_size=5), 8)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 64}, r"hidden_size 32 here, 64 in the model"),
        ({"num_hidden_layers": 4}, r"num_hidden_layers 3 here, 4 in the model"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads 2 here, 4 in the model"),
        ({"vocab_size": 99}, r"vocab_size 98 here, 99 in the model"),
        ({"head_dim": 16}, r"head_dim 8 here, 16 in the model"),
    ],
)
def test_another_geometry_is_named(changes, match):
    with pytest.raises(ValueError, match=match):
        make().check_model(LlamaConfig(**TINY | changes), [0, 1, 2])


def test_other_layers_are_named():
    with pytest.raises(ValueError, match=r"\(layers \[0, 1, 2\] here, \[0, 2\] in the model\)"):
        make().check_model(LlamaConfig(**TINY), [0, 2])


def test_the_file_is_named_where_there_is_one(tmp_path):
    calibration = make()
    calibration.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"the calibration '.*c\.safetensors' does not fit the cache"):
        calibration.check_settings(Attention(), 9)


@pytest.mark.parametrize(
    ("made_for", "used_with", "warns"),
    [
        ("org/small", "org/large", True),
        ("org/small", "/models/small", False),
        ("org/small", "", False),
        ("", "org/large", False),
    ],
)
def test_another_name_only_warns(made_for, used_with, warns, recwarn):
    ours, theirs = LlamaConfig(**TINY), LlamaConfig(**TINY)
    ours._name_or_path, theirs._name_or_path = made_for, used_with
    calibration = make(ours)
    expected = f"the calibration was made for {made_for!r} and is used with {used_with!r}"
    assert calibration.check_model(theirs, [0, 1, 2]) == (expected if warns else None)
    cache = HardKVCache(config=theirs, budget=64, calibration=calibration, **SETTINGS)
    assert cache.stats().warnings == ([expected] if warns else [])
    assert any(expected in str(warning.message) for warning in recwarn) == warns


# ---------------------------------------------------------------------- configs and caches


@pytest.mark.parametrize("source", ["object", "path", "string"])
@pytest.mark.parametrize(("build", "budget"), [(make, Risk(64)), (temperatures_only, Adaptive(64))])
def test_an_integer_means_what_the_calibration_allows(source, build, budget, tmp_path):
    calibration = build()
    path = calibration.save(tmp_path / "c.safetensors")
    given = {"object": calibration, "path": path, "string": str(path)}[source]
    config = HardKVConfig(budget=64, calibration=given, **SETTINGS)
    assert config.budget == budget
    assert isinstance(config.calibration, Calibration)
    assert torch.equal(config.calibration.temperatures, calibration.temperatures)
    cache = HardKVCache(config=LlamaConfig(**TINY), budget=64, calibration=given, **SETTINGS)
    assert cache.settings.budget == budget


def test_online_temperatures_mean_adaptive():
    assert HardKVConfig(budget=64, calibration="online").budget == Adaptive(64)
    assert HardKVConfig(budget=64).budget == TopK(64)


@pytest.mark.parametrize("budget", [Risk(64), TopP(0.9), Adaptive(64), Pyramid(Adaptive(64))], ids=str)
def test_budgets_that_can_use_it(budget):
    assert HardKVConfig(budget=budget, calibration=make(), **SETTINGS).budget == budget


@pytest.mark.parametrize("budget", [TopK(64), AdaKV(64), Pyramid(64)], ids=str)
def test_budgets_that_cannot_use_it_are_refused(budget):
    with pytest.raises(ValueError, match=r"ranks by scores alone and cannot use a calibration"):
        HardKVConfig(budget=budget, calibration=make(), **SETTINGS)


@pytest.mark.parametrize("calibration", [None, "online", temperatures_only()], ids=["none", "online", "temperatures"])
def test_risk_needs_curves(calibration):
    for budget in (Risk(64), {"name": "risk", "n": 64}):
        with pytest.raises(ValueError, match=r"Risk\(n=64.* needs measured risk curves: pass calibration='auto'"):
            HardKVConfig(budget=budget, calibration=calibration, **SETTINGS)


def test_a_config_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"window 8 here, 32 in the cache"):
        HardKVConfig(budget=64, calibration=make())
    with pytest.raises(ValueError, match=r"scorer.*snapkv"):
        HardKVConfig(budget=64, calibration=make(), **SETTINGS | {"scorer": "snapkv"})
    with pytest.raises(TypeError, match=r"calibration=7 must be None, 'online', 'auto', a Calibration or the path"):
        HardKVConfig(budget=64, calibration=7)
    with pytest.raises(ValueError, match=r"refit=3 is for calibration='online'"):
        HardKVConfig(budget=64, calibration=make(), refit=3, **SETTINGS)


def test_a_cache_refuses_another_model_or_none():
    settings = {"budget": 64, "calibration": make(), **SETTINGS}
    with pytest.raises(ValueError, match=r"hidden_size 32 here, 64 in the model"):
        HardKVCache(config=LlamaConfig(**TINY | {"hidden_size": 64}), **settings)
    with pytest.raises(ValueError, match=r"pass config=model.config"):
        HardKVCache(**settings)


def test_a_cache_checks_which_layers_it_compresses():
    hybrid = Gemma3TextConfig(
        **TINY | {"num_hidden_layers": 4}, head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2
    )
    HardKVCache(config=hybrid, budget=64, calibration=make(hybrid, layers=(1, 3)), **SETTINGS)
    with pytest.raises(ValueError, match=r"layers \[0, 1\] here, \[1, 3\] in the model"):
        HardKVCache(config=hybrid, budget=64, calibration=make(hybrid, layers=(0, 1)), **SETTINGS)


def prefilled(tokens=150, **arguments):
    """The lengths `[layers, kv_heads]` of a cache after a prompt."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    cache = HardKVCache(config=model.config, **SETTINGS, **arguments)
    with torch.no_grad():
        model(torch.arange(tokens)[None] % 90, **{CACHE: cache})
    return cache.lengths()[:, 0]


def test_risk_decides_what_a_cache_keeps():
    calibration = make()
    lengths = prefilled(budget=64, calibration=calibration)
    assert torch.equal(lengths, Risk(64).allocation(calibration.curves, 150, 10))
    assert len(lengths.unique()) > 1
    assert lengths.sum() == 64 * lengths.numel()
    reversed_heads = replace(calibration, risk=calibration.risk.flip(1))
    assert torch.equal(prefilled(budget=64, calibration=reversed_heads), lengths.flip(1))


def test_temperatures_reach_their_heads():
    # Head 0 of even layers and head 1 of odd ones are told that their scores are too flat: few tokens do for them.
    sharp = torch.tensor([[True, False], [False, True], [True, False]])
    calibration = temperatures_only(temperatures=torch.where(sharp, 0.02, 50.0))
    for budget in (64, TopP(0.9)):
        lengths = prefilled(budget=budget, calibration=calibration)
        assert torch.equal(lengths < lengths.flip(1), sharp)


# ---------------------------------------------------------------------- JSON


@pytest.mark.parametrize("build", [make, temperatures_only])
def test_a_saved_calibration_goes_through_json(build, tmp_path):
    calibration = build()
    path = calibration.save(tmp_path / "c.safetensors")
    config = HardKVConfig(budget=64, calibration=calibration, interval=32, **SETTINGS)
    assert json.loads(config.to_json())["calibration"] == str(path)
    again = HardKVConfig.from_json(config.to_json())
    assert again.to_json() == config.to_json()
    assert again.budget == config.budget
    assert {name: bits(getattr(again.calibration, name)) for name in TENSORS} == {
        name: bits(getattr(calibration, name)) for name in TENSORS
    }
    cache = HardKVCache(config=LlamaConfig(**TINY), **config.to_dict())
    assert cache.settings.to_json() == config.to_json()


@pytest.mark.parametrize("word", ["auto", "online"])
def test_words_go_through_json(word):
    config = HardKVConfig(budget=64, calibration=word)
    assert config.to_dict()["calibration"] == word
    assert HardKVConfig.from_json(config.to_json()) == config


def test_an_unsaved_calibration_has_no_json():
    config = HardKVConfig(budget=64, calibration=make(), **SETTINGS)
    with pytest.raises(ValueError, match=r"no JSON form before it is saved: calibration.save\(path\)"):
        config.to_json()
