"""The two contracts and the registry: what users build on."""

import ast
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hardkv.kernels
import hardkv.selectors
from hardkv.selectors import (
    BUDGETS,
    RKV,
    SCORERS,
    AdaKV,
    Adaptive,
    Attention,
    Budget,
    Observation,
    Pyramid,
    SnapKV,
    TopK,
    TopP,
    get_budget,
    get_scorer,
    register_scorer,
)
from hardkv.selectors.budgets import budget_to_dict
from hardkv.selectors.scorers.scorer import scorer_to_dict


def type_name(value):
    """A test id without a memory address."""
    return type(value).__name__


def small_observation(batch=2, heads=2, columns=6, group=2, **options):
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(batch, heads, columns, 4, generator=generator) for _ in range(2))
    queries = torch.randn(batch, heads * group, 2, 4, generator=generator)
    return Observation.from_dense(keys, values, queries, **options)


# ---------------------------------------------------------------- scorers by name


class TestScorerRegistry:
    @pytest.mark.parametrize(("name", "cls"), [("attention", Attention), ("snapkv", SnapKV), ("rkv", RKV)])
    def test_by_name(self, name, cls):
        assert SCORERS[name] is cls
        assert get_scorer(name) == cls()
        assert get_scorer({"name": name}) == cls()

    def test_an_object_is_handed_back(self):
        scorer = SnapKV(kernel_size=3)
        assert get_scorer(scorer) is scorer

    @pytest.mark.parametrize("scorer", [Attention(), SnapKV(5, "avg", "max"), RKV(0.3, 0.8, 5, "none")], ids=str)
    def test_json_round_trip(self, scorer):
        assert get_scorer(json.loads(json.dumps(scorer_to_dict(scorer)))) == scorer

    def test_dict_is_left_alone(self):
        spec = {"name": "snapkv", "kernel_size": 3}
        get_scorer(spec)
        assert spec == {"name": "snapkv", "kernel_size": 3}

    @pytest.mark.parametrize(
        ("wrong", "meant"), [("snapvk", "snapkv"), ("SnapKV", "snapkv"), ("atention", "attention")]
    )
    def test_unknown_name_suggests_the_close_one(self, wrong, meant):
        with pytest.raises(ValueError, match=rf"'{wrong}'.*'{meant}'"):
            get_scorer(wrong)

    def test_unknown_name_lists_all(self):
        with pytest.raises(ValueError, match="attention, rkv, snapkv") as error:
            get_scorer("zzz")
        assert "Did you mean" not in str(error.value)

    def test_dict_without_a_name(self):
        with pytest.raises(ValueError, match="attention, rkv, snapkv"):
            get_scorer({"kernel_size": 3})

    def test_unknown_hyperparameter(self):
        with pytest.raises(ValueError, match=r"snapkv.*kernel_width"):
            get_scorer({"name": "snapkv", "kernel_width": 3})

    @pytest.mark.parametrize("cls", [Attention, SnapKV, RKV])
    def test_class_instead_of_instance(self, cls):
        with pytest.raises(TypeError, match="instance"):
            get_scorer(cls)

    @pytest.mark.parametrize("other", [None, 3, 2.5, ["snapkv"], object()], ids=type_name)
    def test_neither_name_nor_scorer(self, other):
        with pytest.raises(TypeError, match="score"):
            get_scorer(other)

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: SnapKV(kernel_size=4), "kernel_size=4"),
            (lambda: SnapKV(kernel_size=0), "kernel_size=0"),
            (lambda: SnapKV(kernel_size=-3), "kernel_size=-3"),
            (lambda: SnapKV(pooling="mean"), "pooling='mean'"),
            (lambda: SnapKV(group_reduce="sum"), "group_reduce='sum'"),
            (lambda: RKV(lam=1.5), r"lam=1\.5"),
            (lambda: RKV(lam=-0.1), r"lam=-0\.1"),
            (lambda: RKV(lam=float("nan")), "lam=nan"),
            (lambda: RKV(threshold=-0.1), r"threshold=-0\.1"),
            (lambda: RKV(kernel_size=2), "kernel_size=2"),
            (lambda: RKV(pooling="median"), "pooling='median'"),
            (lambda: get_scorer({"name": "rkv", "lam": 7}), "lam=7"),
        ],
    )
    def test_bad_hyperparameters_name_argument_and_value(self, build, message):
        with pytest.raises(ValueError, match=message):
            build()

    @pytest.mark.parametrize(
        "arguments", [{"lam": "0.5"}, {"lam": None}, {"threshold": "high"}, {"threshold": None}], ids=str
    )
    def test_hyperparameters_of_the_wrong_type_name_argument_and_value(self, arguments):
        ((name, value),) = arguments.items()
        with pytest.raises((TypeError, ValueError), match=rf"{name}={value!r}"):
            RKV(**arguments)


class TestUserScorer:
    def test_one_method_is_enough(self):
        class Newest:
            def score(self, observation: Observation) -> Tensor:
                return observation.positions.float()

        scorer, observation = Newest(), small_observation(window=1)
        assert get_scorer(scorer) is scorer
        keep = TopK(3).select(scorer.score(observation), observation)
        assert keep.tolist() == [False, False, False, True, True, True] * 4

    def test_registered_dataclass_goes_by_name_and_to_json(self, monkeypatch):
        monkeypatch.setattr("hardkv.selectors.scorers.scorer.SCORERS", dict(SCORERS))

        @register_scorer("knorm")
        @dataclass(frozen=True)
        class KeyNorm:
            power: float = 1.0

            def score(self, observation: Observation) -> Tensor:
                return -self.power * observation.keys.norm(dim=-1).log()

        assert get_scorer("knorm") == KeyNorm()
        assert get_scorer(json.loads(json.dumps(scorer_to_dict(KeyNorm(2.0))))) == KeyNorm(2.0)
        assert KeyNorm().score(small_observation()).shape == (24,)
        with pytest.raises(ValueError, match="'knorm'"):
            get_scorer("knrm")

    def test_unregistered_has_no_json_form(self):
        class Plain:
            def score(self, observation: Observation) -> Tensor:
                return observation.positions.float()

        with pytest.raises(ValueError, match="register_scorer"):
            scorer_to_dict(Plain())

    def test_registered_but_no_dataclass_has_no_json_form(self, monkeypatch):
        class Plain:
            def score(self, observation: Observation) -> Tensor:
                return observation.positions.float()

        monkeypatch.setitem(SCORERS, "plain", Plain)
        with pytest.raises(ValueError, match="dataclass"):
            scorer_to_dict(Plain())

    def test_subclass_of_a_registered_scorer_does_not_pass_as_it(self):
        class Mine(SnapKV):
            pass

        with pytest.raises(ValueError, match="register_scorer"):
            scorer_to_dict(Mine())

    def test_value_aware_scorer_sees_what_it_needs(self):
        """Attention times the norm of the value, in one expression."""
        observation = small_observation(sinks=1, window=2)
        z = (observation.attention * observation.values.norm(dim=-1)).log()
        assert torch.isfinite(z).all()
        assert int(AdaKV(4).select(z, observation).sum()) == 16


# ---------------------------------------------------------------- budgets by value


@dataclass(frozen=True)
class Everything(Budget):
    """A user's budget."""

    def counts(self, ranking):
        return ranking.num_candidates


class TestBudgetRegistry:
    def test_names(self):
        assert {"topk": TopK, "adakv": AdaKV, "pyramid": Pyramid, "topp": TopP, "adaptive": Adaptive}.items() <= (
            BUDGETS.items()
        )

    def test_an_integer_means_topk(self):
        assert get_budget(77) == TopK(77)

    def test_an_object_is_handed_back(self):
        budget = Adaptive(9)
        assert get_budget(budget) is budget

    @pytest.mark.parametrize(
        "budget",
        [
            TopK(9),
            AdaKV(9, alpha=0.4),
            Pyramid(9, beta=3),
            Pyramid(AdaKV(9, alpha=0.1), beta=3),
            Pyramid(Adaptive(9, floor=2, cap=30)),
            TopP(0.9),
            TopP(0.8, floor=4, cap=None),
            Adaptive(9, floor=3, cap=20),
        ],
        ids=str,
    )
    def test_json_round_trip(self, budget):
        assert get_budget(json.loads(json.dumps(budget_to_dict(budget)))) == budget

    def test_dict_is_left_alone(self):
        spec = {"name": "pyramid", "n": {"name": "adakv", "n": 9}}
        assert get_budget(spec) == Pyramid(AdaKV(9))
        assert spec == {"name": "pyramid", "n": {"name": "adakv", "n": 9}}

    def test_user_budget_has_no_json_form_until_registered(self, monkeypatch):
        with pytest.raises(ValueError, match="Everything"):
            budget_to_dict(Everything())
        monkeypatch.setitem(BUDGETS, "everything", Everything)
        assert get_budget(json.loads(json.dumps(budget_to_dict(Everything())))) == Everything()

    def test_subclass_of_a_registered_budget_does_not_pass_as_it(self):
        class Mine(TopK):
            pass

        with pytest.raises(ValueError, match="register_budget"):
            budget_to_dict(Mine(9))

    @pytest.mark.parametrize(("wrong", "meant"), [("adkv", "adakv"), ("TopP", "topp"), ("piramid", "pyramid")])
    def test_unknown_name_suggests_the_close_one(self, wrong, meant):
        with pytest.raises(ValueError, match=rf"'{wrong}'.*'{meant}'"):
            get_budget({"name": wrong, "n": 9})

    def test_unknown_name_lists_all(self):
        with pytest.raises(ValueError, match="adakv, adaptive, pyramid, risk, topk, topp"):
            get_budget({"n": 9})

    @pytest.mark.parametrize("spec", [{"name": "topk"}, {"name": "topk", "n": 9, "alpha": 0.1}], ids=str)
    def test_wrong_hyperparameters(self, spec):
        with pytest.raises(ValueError, match=r"topk.*'(n|alpha)'"):
            get_budget(spec)

    @pytest.mark.parametrize("other", [None, "topk", 2.5, True, [9], TopK, object()], ids=type_name)
    def test_neither_number_nor_budget(self, other):
        with pytest.raises(TypeError, match=r"budget=.*integer"):
            get_budget(other)

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: get_budget(0), "n=0"),
            (lambda: get_budget(-5), "n=-5"),
            (lambda: TopK(0), "n=0"),
            (lambda: AdaKV(9, alpha=-0.1), r"alpha=-0\.1"),
            (lambda: AdaKV(9, alpha=1.1), r"alpha=1\.1"),
            (lambda: AdaKV(9, alpha=float("nan")), "alpha=nan"),
            (lambda: AdaKV(-1), "n=-1"),
            (lambda: Pyramid(0), "n=0"),
            (lambda: Pyramid(9, beta=0), "beta=0"),
            (lambda: TopP(0), "p=0"),
            (lambda: TopP(0.0), r"p=0\.0"),
            (lambda: TopP(1.01), r"p=1\.01"),
            (lambda: TopP(-0.5), r"p=-0\.5"),
            (lambda: TopP(float("nan")), "p=nan"),
            (lambda: TopP(0.9, floor=-1), "floor=-1"),
            (lambda: TopP(0.9, cap=0), "cap=0"),
            (lambda: TopP(0.9, floor=9, cap=8), "cap=8.*floor=9"),
            (lambda: Adaptive(9, floor=10), "floor=10.*n=9"),
            (lambda: Adaptive(9, cap=8), "cap=8.*n=9"),
            (lambda: Adaptive(9, floor=-2), "floor=-2"),
            (lambda: get_budget({"name": "topp", "p": 3}), "p=3"),
        ],
    )
    def test_bad_values_name_argument_and_value(self, build, message):
        with pytest.raises(ValueError, match=message):
            build()

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: TopK(1.5), r"n=1\.5"),
            (lambda: TopK("9"), "n='9'"),
            (lambda: TopK(True), "n=True"),
            (lambda: AdaKV(9, alpha="x"), "alpha='x'"),
            (lambda: Pyramid(TopP(0.9)), r"n=TopP\("),
            (lambda: Pyramid(9, beta=2.5), r"beta=2\.5"),
            (lambda: TopP("0.9"), "p='0.9'"),
            (lambda: TopP(None), "p=None"),
            (lambda: TopP(0.9, cap=1.0), r"cap=1\.0"),
            (lambda: Adaptive(9, floor=0.1), r"floor=0\.1"),
        ],
    )
    def test_wrong_types_name_argument_and_value(self, build, message):
        with pytest.raises(TypeError, match=message):
            build()

    @pytest.mark.parametrize("budget", [TopK(9), AdaKV(9), Pyramid(9), TopP(0.5), Adaptive(9)], ids=str)
    def test_budgets_do_not_change(self, budget):
        with pytest.raises(AttributeError):
            budget.n = 10


# ---------------------------------------------------------------- observations


class TestFromDense:
    def test_layout(self):
        """Rows are (sequence, head), row-major; tokens ascend in position."""
        keys = torch.arange(2 * 2 * 3).reshape(2, 2, 3, 1).float()
        mask = torch.tensor([[[1, 1, 1], [0, 1, 1]], [[0, 0, 0], [1, 0, 1]]]).bool()
        observation = Observation.from_dense(keys, keys + 100, torch.zeros(2, 4, 2, 1), mask=mask, window=1, sinks=1)
        assert observation.keys[:, 0].tolist() == [0, 1, 2, 4, 5, 9, 11]
        assert observation.values[:, 0].tolist() == [100, 101, 102, 104, 105, 109, 111]
        assert observation.positions.tolist() == [0, 1, 2, 1, 2, 0, 2]
        assert observation.cu_seqlens.tolist() == [0, 3, 5, 5, 7]
        assert observation.lengths.tolist() == [3, 2, 0, 2]
        assert observation.row.tolist() == [0, 0, 0, 1, 1, 3, 3]
        assert observation.protected.tolist() == [True, False, True, True, True, True, True]
        assert observation.window_mask.tolist() == [False, False, True, False, True, False, True]
        assert observation.query_positions.tolist() == [1, 2]
        assert observation.query_valid.tolist() == [[True, True], [False, True]]
        assert (observation.batch_size, observation.num_rows, observation.num_kv_heads) == (2, 4, 2)
        assert observation.max_length == 3
        assert observation.positions.dtype == observation.cu_seqlens.dtype == torch.int32

    def test_defaults(self):
        observation = small_observation()
        assert observation.scale == 0.5
        assert observation.window == 2
        assert observation.protected.tolist() == [False, False, False, False, True, True] * 4
        assert observation.softcap is None

    def test_mask_of_sequences_holds_for_every_head(self):
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
        flat, full = small_observation(mask=mask), small_observation(mask=mask[:, None].expand(2, 2, 6))
        assert flat.lengths.tolist() == [4, 4, 6, 6]
        assert torch.equal(flat.keys, full.keys)
        assert torch.equal(flat.positions, full.positions)

    def test_integer_mask_is_read_as_bool(self):
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        assert small_observation(mask=mask).lengths.tolist() == [4, 4, 6, 6]

    def test_values_may_have_their_own_width(self):
        observation = Observation.from_dense(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 7), torch.randn(1, 2, 2, 4))
        assert observation.values.shape == (10, 7)

    @pytest.mark.parametrize(
        ("keys", "values", "queries", "named"),
        [
            ((2, 2, 6, 4), (2, 2, 6, 4), (1, 4, 2, 4), "queries"),
            ((2, 2, 6, 4), (2, 2, 6, 4), (2, 3, 2, 4), "queries"),
            ((2, 2, 6, 4), (2, 2, 6, 4), (2, 1, 2, 4), "queries"),
            ((2, 2, 6, 4), (2, 2, 6, 4), (2, 4, 2, 5), "queries"),
            ((2, 2, 6, 4), (2, 2, 5, 4), (2, 4, 2, 4), "values"),
            ((2, 2, 6, 4), (2, 4, 6, 4), (2, 4, 2, 4), "values"),
            ((2, 2, 6, 4), (2, 2, 6), (2, 4, 2, 4), "values"),
            ((2, 2, 6, 4), (2, 2, 6, 4), (4, 2, 4), "queries"),
            ((2, 6, 4), (2, 6, 4), (2, 4, 2, 4), "keys"),
        ],
    )
    def test_shapes_that_do_not_fit(self, keys, values, queries, named):
        with pytest.raises(ValueError, match=rf"{named}.*\("):
            Observation.from_dense(torch.zeros(keys), torch.zeros(values), torch.zeros(queries))

    @pytest.mark.parametrize("shape", [(2, 5), (1, 6), (2, 2, 7), (2, 4, 6), (6,), (2, 2, 6, 4)], ids=str)
    def test_mask_that_does_not_fit(self, shape):
        with pytest.raises(ValueError, match="mask"):
            small_observation(mask=torch.ones(shape, dtype=torch.bool))


def test_several_layers_are_split_into_each():
    """Their sequences follow one another; all that a budget or a scorer reads is then that of the layer alone."""
    generator, alone = torch.Generator().manual_seed(0), []
    for columns in (5, 7, 4):
        keys, values = (torch.randn(2, 2, columns, 4, generator=generator) for _ in range(2))
        mask = torch.rand(2, 2, columns, generator=generator) < 0.8
        mask[:, :, columns - 2] = columns != 7  # a query that does not count in one of the layers
        queries = torch.randn(2, 4, 2, 4, generator=generator)
        each = Observation.from_dense(keys, values, queries, window=1, sinks=1, mask=mask)
        alone.append(replace(each, tokens=each.tokens + 5))  # some are evicted

    def joined(name):
        return torch.cat([getattr(each, name) for each in alone])

    rows = [each.rows for each in alone]
    starts = torch.tensor([0, rows[0].total, rows[0].total + rows[1].total])
    cu_seqlens = torch.cat([torch.zeros(1), *(r.cu_seqlens[1:] + s for r, s in zip(rows, starts, strict=True))]).int()
    flat = {name: joined(name) for name in ("keys", "positions", "queries", "query_valid", "protected", "window_mask")}
    whole = replace(
        alone[0],
        load_values=lambda: joined("values"),
        cu_seqlens=cu_seqlens,
        longest=9,
        tokens=joined("tokens"),
        **flat,
    )
    assert whole.max_length == 9  # an upper bound, if it is no more than all tokens
    assert replace(whole, longest=1000).max_length == len(whole.keys)
    for part, expected in zip(whole.split(rows), alone, strict=True):
        for name in (*flat, "values", "cu_seqlens", "context", "lengths", "row"):
            assert torch.equal(getattr(part, name), getattr(expected, name)), name
        assert torch.equal(part.context, expected.tokens)
        assert (part.batch_size, part.num_kv_heads, part.max_length) == (2, 2, expected.max_length)
    for part, expected in zip(replace(whole, tokens=None).split(rows), alone, strict=True):
        assert torch.equal(part.context, expected.lengths.view(2, 2).amax(1))


class TestPadding:
    @settings(max_examples=50, deadline=None)
    @given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))
    def test_round_trip(self, data, batch, heads, columns):
        """`to_flat` undoes `to_padded`, which left-aligns every row and fills behind it."""
        bits = data.draw(st.lists(st.booleans(), min_size=batch * heads * columns, max_size=batch * heads * columns))
        mask = torch.tensor(bits, dtype=torch.bool).reshape(batch, heads, columns)
        keys = torch.zeros(batch, heads, columns, 2)
        observation = Observation.from_dense(keys, keys, torch.zeros(batch, heads, 1, 2), mask=mask)
        z = torch.arange(int(mask.sum())).double() + 1
        padded = observation.to_padded(z)
        lengths = mask.sum(-1)
        assert padded.shape == (batch, heads, int(lengths.max()))
        rest = z.tolist()
        for b in range(batch):
            for h in range(heads):
                length = int(lengths[b, h])
                assert padded[b, h, :length].tolist() == rest[:length]
                assert torch.all(padded[b, h, length:] == -torch.inf)
                rest = rest[length:]
        assert torch.equal(observation.to_flat(padded), z)
        assert torch.equal(observation.to_flat(padded.flatten(0, 1)), z)
        assert torch.equal(observation.to_flat(observation.to_padded(z, fill=7.0)), z)

    def test_no_columns(self):
        keys = torch.zeros(2, 2, 0, 4)
        observation = Observation.from_dense(keys, keys, torch.zeros(2, 4, 3, 4))
        assert observation.lengths.tolist() == [0, 0, 0, 0]
        assert observation.to_padded(torch.zeros(0)).shape == (2, 2, 0)
        assert observation.to_flat(torch.zeros(2, 2, 0)).shape == (0,)
        for name in SCORERS:
            z = get_scorer(name).score(observation)
            assert Adaptive(3).select(z, observation).shape == (0,)

    def test_keeps_the_dtype(self):
        observation = small_observation()
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert observation.to_padded(torch.zeros(24, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("package", "may_import"),
    [(hardkv.selectors, ("hardkv.selectors", "hardkv.kernels")), (hardkv.kernels, ("hardkv.kernels",))],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_needs_no_cache_and_no_model(package, may_import):
    """Selectors import kernels, kernels nothing of ours, and neither imports transformers."""
    files = sorted(Path(package.__file__).parent.glob("**/*.py"))
    assert len(files) > 4
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name} imports relatively"
                names = [node.module]
            for name in names:
                ours = name.split(".")[0] in ("hardkv", "transformers")
                assert not ours or name.startswith(may_import), f"{file.name} imports {name}"
