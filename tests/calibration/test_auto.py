"""`calibration="auto"`: one file for a model's weights, and what becomes of it when files and folders are bad."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hardkv.calibration.auto
import hardkv.calibration.calibrate
from hardkv import Calibration, HardKVCache, calibrate
from hardkv.calibration.fingerprint import fingerprint
from hardkv.selectors import Adaptive, Risk
from tests.cache import conftest as tiny
from tests.calibration.test_calibrate import QUIET, SIZES, as_text, make_texts, make_tokenizer

ARGUMENTS = {"budget": 20, "calibration": "auto", **SIZES}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A saved tiny model with a tokenizer; short default texts; `calls` of calibrate; `files` in the cache folder."""
    folder, store = tmp_path / "tiny-llama", tmp_path / "store"
    tiny.make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    monkeypatch.setenv("HARDKV_CACHE", str(store))
    monkeypatch.setattr(hardkv.calibration.auto, "_unsaved", {})
    texts = {str(i): as_text(ids) for i, ids in enumerate(make_texts(64, 80))}
    monkeypatch.setattr(hardkv.calibration.calibrate, "default_texts", lambda: texts)

    @dataclass
    class Checkpoint:
        folder: Path
        texts: list
        calls: int = 0

        def load(self, folder=None):
            return AutoModelForCausalLM.from_pretrained(folder or self.folder).eval()

        @property
        def files(self):
            return sorted(store.glob("*")) if store.exists() else []

    found = Checkpoint(folder, list(texts.values()))

    def counted(*args, **kwargs):
        found.calls += 1
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(hardkv.calibration.auto, "calibrate", counted)
    return found


def used(model, **changes):
    """What a cache made now uses."""
    return HardKVCache(config=model, **(ARGUMENTS | changes)).settings.calibration


# ---------------------------------------------------------------- what a file belongs to


def test_calibrates_once(checkpoint):
    model = checkpoint.load()
    first = HardKVCache(config=model, **ARGUMENTS)
    assert checkpoint.calls == 1
    assert len(checkpoint.files) == 1
    assert checkpoint.files[0].name.startswith("llama-rkv-")
    assert first.settings.budget == Risk(20)
    by_hand = calibrate(model, checkpoint.texts, tokenizer=make_tokenizer(), **SIZES, **QUIET)
    assert torch.equal(first.settings.calibration.risk, by_hand.risk)

    written = checkpoint.files[0].stat().st_mtime_ns
    second = HardKVCache(config=model, **ARGUMENTS)
    model = checkpoint.load()  # another process, as it were
    third = HardKVCache(config=model, **ARGUMENTS)
    assert checkpoint.calls == 1
    assert [file.stat().st_mtime_ns for file in checkpoint.files] == [written]
    for cache in (second, third):
        assert torch.equal(cache.settings.calibration.risk, by_hand.risk)
        assert torch.equal(cache.settings.calibration.temperatures, by_hand.temperatures)
        assert cache.settings.to_dict()["calibration"] == str(checkpoint.files[0])
        assert cache.warnings == []


def test_settings_have_files_of_their_own(checkpoint):
    model = checkpoint.load()
    variants = [
        {},
        {"scorer": "snapkv"},
        {"scorer": {"name": "snapkv", "kernel_size": 3}},
        {"window": 6},
        {"interval": 20},
    ]
    for number, change in enumerate(variants, 1):
        cache = HardKVCache(config=model, **(ARGUMENTS | change))
        assert checkpoint.calls == len(checkpoint.files) == number
        assert cache.settings.calibration.provenance["window"] == cache.settings.window
    for change in ({"budget": Adaptive(30)}, {"budget": Risk(40), "patience": 2}, {"scorer": "snapkv"}):
        HardKVCache(config=model, **(ARGUMENTS | change))
    assert checkpoint.calls == len(checkpoint.files) == len(variants)


def test_the_same_weights_elsewhere_are_the_same(checkpoint, tmp_path):
    model = checkpoint.load()
    first = used(model)
    model.save_pretrained(tmp_path / "other-name")  # without a tokenizer, which nothing needs any more
    other = checkpoint.load(tmp_path / "other-name")
    cache = HardKVCache(config=other, **ARGUMENTS)
    assert checkpoint.calls == len(checkpoint.files) == 1
    assert cache.settings.calibration.path == first.path
    assert cache.stats().warnings == []


def test_other_weights_of_the_same_name_are_others(checkpoint):
    """Another revision, or a folder that was written again: with its times, or without."""
    first = used(checkpoint.load())
    times = {file: file.stat().st_mtime_ns for file in checkpoint.folder.iterdir()}
    tiny.make_model("llama", seed=5).save_pretrained(checkpoint.folder)
    for file, time in times.items():
        os.utime(file, ns=(time, time))
    model = checkpoint.load()
    second = used(model)
    assert checkpoint.calls == len(checkpoint.files) == 2
    by_hand = calibrate(model, checkpoint.texts, tokenizer=make_tokenizer(), **SIZES, **QUIET)
    assert torch.equal(second.risk, by_hand.risk)
    assert not torch.equal(first.risk, second.risk)


def test_weights_that_change_in_memory(checkpoint):
    """A LoRA merged into one layer, and taken out again."""
    model = checkpoint.load()
    first = used(model)
    weight = model.model.layers[1].self_attn.q_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += torch.ones(weight.shape[0], 1) @ torch.ones(1, weight.shape[1])
        merged = used(model)
        weight.copy_(before)
    assert checkpoint.calls == len(checkpoint.files) == 2
    assert not torch.equal(first.risk, merged.risk)
    assert used(model).path == first.path
    assert checkpoint.calls == 2


def test_positions_that_are_scaled_otherwise_are_others(checkpoint):
    """The same weights attend differently."""
    used(checkpoint.load())
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    used(AutoModelForCausalLM.from_pretrained(checkpoint.folder, rope_parameters=rope).eval())
    assert checkpoint.calls == len(checkpoint.files) == 2


# ---------------------------------------------------------------- which model


def test_a_config_alone_is_refused(checkpoint):
    """Whose weights nobody knows."""
    model = checkpoint.load()
    with pytest.raises(ValueError, match="a config holds none: pass config=model instead of config=model.config"):
        HardKVCache(config=model.config, **ARGUMENTS)
    assert checkpoint.calls == 0


def test_models_that_share_a_config(checkpoint):
    """As `LlamaForCausalLM(config)` makes them, twice."""
    model = checkpoint.load()
    other = LlamaForCausalLM(model.config).eval()
    first = used(model)
    assert not torch.equal(used(other).risk, first.risk)
    assert checkpoint.calls == 2
    other.load_state_dict(model.state_dict())
    assert used(other).path == first.path
    assert checkpoint.calls == 2


def test_a_model_without_a_checkpoint(checkpoint):
    model = tiny.make_model("llama", seed=7)
    with pytest.raises(ValueError, match="(?s)auto.*no tokenizer.*pass calibration=hardkv.calibrate"):
        used(model)
    assert checkpoint.calls == 0
    same = tiny.make_model("llama")  # weights for which there is a file
    used(checkpoint.load())
    assert used(same).path == checkpoint.files[0]


def test_a_model_without_weights(checkpoint):
    model = checkpoint.load().to("meta")
    with pytest.raises(ValueError, match="those of LlamaForCausalLM cannot be read.*pass calibration=hardkv.calib"):
        used(model)


def test_a_checkpoint_without_a_tokenizer(checkpoint):
    for file in checkpoint.folder.glob("*token*"):
        file.unlink()
    model = checkpoint.load()
    with pytest.raises(ValueError, match="(?s)auto.*no tokenizer.*pass calibration=hardkv.calibrate"):
        used(model)
    assert checkpoint.files == []


def test_not_without_a_config(checkpoint):
    with pytest.raises(ValueError, match="pass config=model$"):
        HardKVCache(**ARGUMENTS)


# ---------------------------------------------------------------- bad files and folders


@pytest.mark.parametrize("kind", ["truncated", "empty", "no JSON", "other weights", "other scorer"])
def test_a_file_that_is_no_use_is_made_again(checkpoint, kind):
    model = checkpoint.load()
    good = used(model)
    (path,) = checkpoint.files
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no JSON":
        path.write_bytes(path.read_bytes().replace(b'"{\\"name', b'"(\\"name'))
    else:
        bad = Calibration.load(path)
        change = {"weights": "0" * 16} if kind == "other weights" else {"scorer": {"name": "attention"}}
        bad.provenance |= change
        bad.risk = bad.risk + 1
        bad.save(path)
    with pytest.warns(UserWarning, match=f"calibration='auto' calibrates again, since.*{path.name}"):
        cache = HardKVCache(config=model, **ARGUMENTS)
    assert checkpoint.calls == 2
    assert torch.equal(cache.settings.calibration.risk, good.risk)
    assert any(path.name in warning for warning in cache.stats().warnings)
    assert checkpoint.files == [path]
    assert HardKVCache(config=model, **ARGUMENTS).warnings == []
    assert checkpoint.calls == 2


def file_in_its_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file")
    monkeypatch.setenv("HARDKV_CACHE", str(tmp_path / "file" / "store"))


def full_disk(tmp_path, monkeypatch):
    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def no_home(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HARDKV_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (file_in_its_place, "is no folder"),
        (full_disk, "No space left"),
        (no_home, "no home folder is known: set HOME, or HARDKV_CACHE"),
    ],
)
def test_without_a_folder_it_stays_in_memory(checkpoint, spoil, message, tmp_path, monkeypatch):
    model = checkpoint.load()
    spoil(tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match=f"cannot keep what it measured.*{message}") as told:
        first = HardKVCache(config=model, **ARGUMENTS)
    assert sum("auto" in str(each.message) for each in told) == 1
    (warning,) = first.stats().warnings
    assert message in warning
    second = HardKVCache(config=model, **ARGUMENTS)
    assert checkpoint.calls == 1
    assert second.settings.calibration is first.settings.calibration
    assert first.settings.calibration.path is None
    assert first.stats().calibration.startswith("in memory, of ")
    assert checkpoint.files == []
    model.lm_head.weight.data += 1
    with pytest.warns(UserWarning, match="cannot keep"):
        third = HardKVCache(config=model, **ARGUMENTS)
    assert third.settings.calibration is not first.settings.calibration


def test_what_is_no_file_stays(checkpoint, tmp_path):
    model = checkpoint.load()
    used(model)
    (path,) = checkpoint.files
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(UserWarning, match="cannot keep what it measured.*is a FIFO"):
        used(model)
    assert path.is_fifo()


def test_another_process_at_the_same_time(checkpoint, monkeypatch):
    """It finds no file either, measures, and keeps its result while this one still measures."""
    model = checkpoint.load()
    results = []

    def slow(*args, **kwargs):
        if not results:
            results.append(None)
            results[0] = used(model)
        return calibrate(*args, **kwargs)

    monkeypatch.setattr(hardkv.calibration.auto, "calibrate", slow)
    ours = used(model)
    assert ours.path == results[0].path
    assert checkpoint.files == [ours.path]
    assert torch.equal(Calibration.load(ours.path).risk, ours.risk)


# ---------------------------------------------------------------- what is told


def test_stats_tell_which_calibration_is_used(checkpoint, tmp_path):
    model = checkpoint.load()
    weights = fingerprint(model)
    cache = HardKVCache(config=model, **ARGUMENTS)
    told = f"{checkpoint.files[0]}, of {str(checkpoint.folder)!r}, weights {weights}"
    assert cache.stats().calibration == cache.stats().to_dict()["calibration"] == told
    assert f"calibration     {told}" in repr(cache.stats())
    by_hand = calibrate(model, make_texts(64), **SIZES, **QUIET)
    assert by_hand.provenance["weights"] == weights
    for calibration, told in (
        (by_hand, f"in memory, of {str(checkpoint.folder)!r}, weights {weights}"),
        (Calibration(by_hand.temperatures, by_hand.residuals), None),
        ("online", "online"),
        (None, ""),
    ):
        if told is None:
            assert str(calibration) == "in memory"
            continue
        cache = HardKVCache(config=model, **(ARGUMENTS | {"calibration": calibration}))
        assert cache.stats().calibration == told
        assert ("calibration     " in repr(cache.stats())) == bool(told)
    old = Calibration.load(checkpoint.files[0])
    del old.provenance["weights"]  # of a file that an earlier hardkv wrote
    assert str(old) == f"{checkpoint.files[0]}, of {str(checkpoint.folder)!r}"
