"""Test HardKVConfig: it is checked, complete, and unchanged by JSON."""

import json
from dataclasses import dataclass, fields
from inspect import signature

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from hardkv import Calibration, HardKVCache, HardKVConfig
from hardkv.cache.model import Traits
from hardkv.calibration.file import describe_scorer
from hardkv.selectors import (
    BUDGETS,
    RKV,
    SCORERS,
    AdaKV,
    Adaptive,
    Attention,
    Pyramid,
    Risk,
    SnapKV,
    TopK,
    TopP,
    get_scorer,
    register_scorer,
)
from hardkv.selectors.budgets import Budget

SCORERS_AND_VARIANTS = [
    "attention",
    "snapkv",
    "rkv",
    Attention(),
    SnapKV(kernel_size=5, pooling="avg", group_reduce="max"),
    RKV(lam=0.3, threshold=0.7, kernel_size=1, pooling="none"),
]
BUDGETS_AND_VARIANTS = [
    512,
    TopK(64),
    AdaKV(64, alpha=0.5),
    TopP(0.9),
    TopP(1, floor=40, cap=None),
    TopP(0.95, floor=64, cap=128),
    Adaptive(64),
    Adaptive(64, floor=48, cap=96),
    Pyramid(64, beta=5),
    Pyramid(AdaKV(64, alpha=0.1), beta=2),
    Pyramid(Adaptive(64, floor=40), beta=1),
]
MEASURED = [Risk(64), Risk(64, scope="layer", floor=0.25), Risk(64, floor=48, cap=96)]  # these need a calibration


@pytest.fixture
def own_scorer():
    """Register a user's scorer; remove it after the test."""
    before = dict(SCORERS)

    @register_scorer("mine")
    @dataclass(frozen=True)
    class Mine:
        weight: float = 1.0

        def score(self, observation):
            return self.weight * observation.positions.float()

    yield Mine
    SCORERS.clear()
    SCORERS.update(before)


@pytest.fixture
def calibrated(tmp_path):
    """Make a model's config, and the file of a calibration for it and a scorer."""

    def make(scorer):
        model_config = LlamaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
        provenance = {
            "name": "",
            "geometry": Traits.of(model_config).geometry,
            "layers": [0, 1, 2],
            "scorer": describe_scorer(get_scorer(scorer)),
            "window": 16,
        }
        loss = torch.arange(1.0, 7.0).view(3, 2, 1) / torch.arange(1.0, 10.0)
        calibration = Calibration(
            torch.ones(3, 2), torch.zeros(3, 2), torch.arange(18, 99, 10), loss, provenance=provenance
        )
        return model_config, str(calibration.save(tmp_path / "calibration.safetensors"))

    return make


@pytest.mark.parametrize("scorer", SCORERS_AND_VARIANTS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS_AND_VARIANTS, ids=str)
def test_through_json_and_back(scorer, budget):
    config = HardKVConfig(
        scorer=scorer, budget=budget, window=16, sinks=2, interval=64, patience=3, pin_prompt=True, attention="torch"
    )
    again = HardKVConfig.from_json(config.to_json())
    assert again == config
    assert type(again.scorer) is type(config.scorer)
    assert type(again.budget) is type(config.budget)
    assert again.to_json() == config.to_json()
    assert HardKVConfig(**config.to_dict()) == config


@pytest.mark.parametrize("scorer", SCORERS_AND_VARIANTS, ids=str)
@pytest.mark.parametrize("budget", MEASURED, ids=str)
def test_with_a_calibration_through_json_and_back(scorer, budget, calibrated):
    """The JSON names the calibration's file."""
    _, path = calibrated(scorer)
    config = HardKVConfig(scorer=scorer, budget=budget, window=16, sinks=2, calibration=path)
    again = HardKVConfig.from_json(config.to_json())
    assert again.budget == budget
    assert (type(again.budget), type(again.budget.floor)) == (type(budget), type(budget.floor))
    assert torch.equal(again.calibration.risk, config.calibration.risk)
    assert config.to_dict()["calibration"] == path
    assert again.to_dict() == config.to_dict()
    assert HardKVConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_every_registered_name_is_covered():
    assert {type(HardKVConfig(scorer=scorer).scorer) for scorer in SCORERS_AND_VARIANTS} >= set(SCORERS.values())
    unmeasured = {type(HardKVConfig(budget=budget).budget) for budget in BUDGETS_AND_VARIANTS}
    assert unmeasured | {type(budget) for budget in MEASURED} == set(BUDGETS.values())


def test_the_json_is_plain_and_complete():
    values = json.loads(HardKVConfig(scorer="rkv", budget=Pyramid(AdaKV(64))).to_json())
    assert list(values) == [field.name for field in fields(HardKVConfig)]
    assert values["scorer"] == {"name": "rkv", "lam": 0.1, "threshold": 0.5, "kernel_size": 7, "pooling": "max"}
    assert values["budget"] == {"name": "pyramid", "n": {"name": "adakv", "n": 64, "alpha": 0.2}, "beta": 20}
    assert HardKVConfig().to_dict()["budget"] == {"name": "topk", "n": 1024}


def test_short_json_means_defaults():
    assert HardKVConfig.from_json("{}") == HardKVConfig()
    config = HardKVConfig.from_json('{"scorer": "snapkv", "budget": 256}')
    assert (config.scorer, config.budget, config.window) == (SnapKV(), TopK(256), 32)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"budjet": 256}', r"unknown arguments \['budjet'\].*allowed.*budget"),
        ('{"budget": 256, "b": 1, "a": 2}', r"unknown arguments \['a', 'b'\]"),
        ('["rkv", 256]', r"expected a JSON object.*list"),
        ("256", r"expected a JSON object.*int"),
        ("{", "Expecting"),
        ('{"window": -1}', "window=-1"),
        ('{"scorer": {"name": "rkv", "lam": 7}}', "lam=7"),
        ('{"budget": {"name": "adakv", "n": 64, "alfa": 0.1}}', "adakv.*alfa"),
        ('{"budget": {"n": 64}}', "budget=None is not known"),
    ],
)
def test_bad_json(text, match):
    with pytest.raises(ValueError, match=match):
        HardKVConfig.from_json(text)


def test_values_are_normalised():
    config = HardKVConfig(scorer="snapkv", budget=64)
    assert config.scorer == SnapKV()
    assert config.budget == TopK(64)
    assert config == HardKVConfig(scorer=SnapKV(), budget=TopK(64))
    assert config != HardKVConfig(scorer=SnapKV(), budget=TopK(65))
    assert HardKVConfig(scorer={"name": "snapkv", "pooling": "avg"}).scorer == SnapKV(pooling="avg")


INTEGERS = [np.int64, np.int32, np.uint8, torch.tensor, lambda value: torch.tensor([value])]


@pytest.mark.parametrize("integer", INTEGERS, ids=["int64", "int32", "uint8", "tensor", "tensor of one"])
def test_every_integer_is_one_and_becomes_plain(integer):
    """Use integers from `np.arange` or a data frame."""

    def config(i, f):
        return [
            HardKVConfig(SnapKV(i(5)), i(200), i(16), i(2), i(32), i(3)),
            HardKVConfig(RKV(f(0.25), f(0.5), i(5)), AdaKV(i(200), f(0.5))),
            HardKVConfig(budget=Pyramid(i(200), i(10))),
            HardKVConfig(budget=TopP(f(0.5), i(40), i(200)), calibration="online", refit=i(4)),
            HardKVConfig(budget=Adaptive(i(100), i(40), i(200))),
        ]

    def fraction(value):
        return np.float32(value)

    given, plain = config(integer, fraction), config(int, float)
    assert given == plain
    assert [each.to_json() for each in given] == [each.to_json() for each in plain]
    assert repr(given) == repr(plain)
    assert repr(Risk(integer(100), floor=integer(40), cap=integer(200))) == repr(Risk(100, floor=40, cap=200))
    assert repr(Risk(100, floor=fraction(0.25))) == repr(Risk(100, floor=0.25))


def test_a_dict_is_not_changed_by_reading_it():
    scorer, budget = {"name": "rkv", "lam": 0.2}, {"name": "pyramid", "n": {"name": "topk", "n": 64}}
    HardKVConfig(scorer=scorer, budget=budget)
    assert scorer == {"name": "rkv", "lam": 0.2}
    assert budget == {"name": "pyramid", "n": {"name": "topk", "n": 64}}


def test_a_cache_takes_the_same_arguments_with_the_same_defaults():
    cache = signature(HardKVCache).parameters
    config = signature(HardKVConfig).parameters
    assert list(cache) == ["config", *config]
    for name, parameter in config.items():
        assert cache[name].default == parameter.default, name
        assert cache[name].kind is parameter.KEYWORD_ONLY, name
    assert HardKVCache().settings == HardKVConfig()


@pytest.mark.parametrize("budget", BUDGETS_AND_VARIANTS, ids=str)
def test_a_cache_from_a_config(budget):
    model_config = LlamaConfig(num_hidden_layers=3)
    config = HardKVConfig(scorer="rkv", budget=budget, window=16, interval=64, patience=1)
    cache = HardKVCache(config=model_config, **config.to_dict())
    assert cache.settings == config
    again = HardKVCache(config=model_config, **json.loads(config.to_json()))
    assert again.settings == config
    assert [layer.budget for layer in again.layers] == [layer.budget for layer in cache.layers]


@pytest.mark.parametrize("budget", MEASURED, ids=str)
def test_a_cache_from_a_config_with_a_calibration(budget, calibrated):
    model_config, path = calibrated("rkv")
    config = HardKVConfig(scorer="rkv", budget=budget, window=16, sinks=2, calibration=path)
    cache = HardKVCache(config=model_config, **config.to_dict())
    again = HardKVCache(config=model_config, **json.loads(config.to_json()))
    assert again.settings.to_dict() == cache.settings.to_dict() == config.to_dict()
    totals = [
        torch.cat([layer.budget.totals(torch.tensor([90]), torch.tensor([18])) for layer in one.layers])
        for one in (cache, again)
    ]
    assert torch.equal(*totals)
    assert totals[0].sum() == 64 * 6
    assert torch.equal(totals[0], budget.allocation(config.calibration.curves, 90, 18))


def test_an_own_registered_scorer(own_scorer):
    config = HardKVConfig(scorer=own_scorer(weight=2.0))
    assert config.to_dict()["scorer"] == {"name": "mine", "weight": 2.0}
    assert HardKVConfig.from_json(config.to_json()) == config
    assert HardKVConfig(scorer="mine").scorer == own_scorer()


def test_objects_without_a_name_have_no_json():
    class Unregistered:
        def score(self, observation):
            return observation.positions.float()

    @dataclass(frozen=True)
    class Everything(Budget):
        def counts(self, ranking):
            return ranking.num_candidates

    with pytest.raises(ValueError, match=r"scorer .*Unregistered.*register it.*register_scorer"):
        HardKVConfig(scorer=Unregistered()).to_json()
    with pytest.raises(ValueError, match=r"budget .*Everything\(\).*register"):
        HardKVConfig(budget=Everything()).to_json()
    with pytest.raises(ValueError, match=r"no JSON form"):
        HardKVConfig(budget=Pyramid(64), scorer=Unregistered()).to_dict()
