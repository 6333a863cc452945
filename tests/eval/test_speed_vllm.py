"""Test how steady steps of vLLM are picked from a trace, and the program with a stand-in for vLLM; errors."""

import json
import sys
from itertools import accumulate
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from eval.speed import vllm, vllm_decode
from eval.speed.cases import MODELS
from eval.speed.vllm_decode import WARM, WINDOW, WINDOWS, record_steps, steady, windows

COMMITTED = Path(__file__).parents[2] / "eval/results/vllm.json"

# Three sequences: two wait for the third, all make a token, one makes two, all make one, and two end.
TRACE = [(0.0, 2, 2), (1.0, 2, 2), (2.0, 3, 3), (3.0, 3, 3), (4.5, 3, 4), (5.0, 3, 3)]
TRACE += [(6.0, 3, 3), (7.0, 3, 3), (8.0, 2, 2), (9.0, 1, 1)]

# A package that has of vLLM what the program uses. Steps take 2 ms, and 5 ms while a prompt is computed.
STAND_IN = """
from types import SimpleNamespace as Some

__version__ = "0.0"
SamplingParams = lambda **options: Some(**options)


class LLM:
    def __init__(self, **options):
        self.options, self.time = options, 0.0
        scheduler = Some(max_num_batched_tokens=1000)
        processor = Some(process_outputs=lambda outputs, engine_core_timestamp=None, iteration_stats=None: None)
        self.llm_engine = Some(vllm_config=Some(scheduler_config=scheduler), output_processor=processor)

    def generate(self, prompts, sampling, use_tqdm):
        assert all(0 <= token < 151936 for prompt in prompts for token in prompt["prompt_token_ids"])
        left = [0] * len(prompts)
        step = 0
        while step == 0 or any(left):
            self.time += 0.005 if step < len(prompts) else 0.002
            if step < len(prompts):
                left[step] = sampling.max_tokens
            outputs = [Some(new_token_ids=[1]) for each in left if each]
            self.llm_engine.output_processor.process_outputs(
                outputs, engine_core_timestamp=self.time, iteration_stats=None
            )
            left = [max(each - 1, 0) for each in left]
            step += 1
"""


def test_steady_steps_are_the_longest_run_in_which_every_sequence_made_one_token():
    assert steady(TRACE, 3) == [(5.0, 17), (6.0, 20), (7.0, 23)]
    assert steady(TRACE, 4) == []
    assert steady([], 1) == []


def test_windows_leave_out_the_first_steps():
    """A step takes a second at first, then 1, 2 and 3 ms, by window."""
    lengths = [1.0] * WARM + [(1 + window) / 1000 for window in range(WINDOWS) for _ in range(WINDOW)]
    steps = [(time, 10 * step) for step, time in enumerate(accumulate(lengths, initial=0.0))]
    ms, made = zip(*windows(steps), strict=True)
    assert ms == pytest.approx((1, 2, 3))
    assert made == tuple(10 * (WARM + WINDOW * window + WINDOW // 2) for window in range(WINDOWS))
    with pytest.raises(ValueError, match=f"{len(steps) - 1} steps in a row, and {len(steps)} are needed"):
        windows(steps[1:])


def test_recording_passes_every_argument_on():
    calls = []
    processor = SimpleNamespace(process_outputs=lambda *args, **options: calls.append((args, options)) or "result")
    trace = record_steps(processor)
    outputs = [SimpleNamespace(new_token_ids=[4]), SimpleNamespace(new_token_ids=[5, 6])]
    assert processor.process_outputs(outputs, engine_core_timestamp=2.5, iteration_stats="stats") == "result"
    assert trace == [(2.5, 2, 3)]
    assert calls == [((outputs,), {"engine_core_timestamp": 2.5, "iteration_stats": "stats"})]


def test_committed_steps_are_the_medians_of_their_windows():
    for record in json.loads(COMMITTED.read_text())["records"]:
        assert len(record["all_step_ms"]) == WINDOWS * vllm_decode.REPEATS
        assert record["step_ms"] == pytest.approx(median(record["all_step_ms"]))


@pytest.mark.parametrize("model", MODELS)
def test_the_written_config_is_the_model_s(model, tmp_path):
    config = MODELS[model]()
    vllm.write_config(config, tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is type(config)
    assert read.architectures == [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[config.model_type]]
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(read, name) == getattr(config, name)


def program(monkeypatch, *arguments, cuda=True):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(sys, "argv", ["vllm", *map(str, arguments)])
    vllm.main()


def test_the_program_measures_every_case_with_every_dtype(monkeypatch, tmp_path):
    site, out = tmp_path / "site", tmp_path / "vllm.json"
    site.mkdir()
    (site / "vllm.py").write_text(STAND_IN)
    program(monkeypatch, "--case", "100x4", "30x1", "--site", site, "--out", out)
    found = json.loads(out.read_text())
    assert found["machine"]["torch"]
    records = found["records"]
    measured = [(each["kv_cache_dtype"], each["context"], each["batch"]) for each in records]
    assert measured == [(dtype, *case) for dtype in ("auto", "fp8") for case in ((100, 4), (30, 1))]
    for record in records:
        assert (record["model"], record["vllm"]) == ("qwen3-8b", "0.0")
        assert record["all_step_ms"] == pytest.approx([2.0] * WINDOWS * vllm_decode.REPEATS)
        assert record["step_ms"] == pytest.approx(2.0)
    # The middle of the middle window; while prompts are computed, 1 + 2 + 3 tokens are made, and 4 in each later step.
    assert records[0]["kv_tokens"] == 4 * 100 + 6 + 4 * (WARM + WINDOW + WINDOW // 2 + 1)


def test_a_failing_process_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text("raise ImportError('broken')")
    with pytest.raises(RuntimeError, match="vLLM failed with --kv-cache-dtype auto"):
        program(monkeypatch, "--site", tmp_path, "--out", tmp_path / "vllm.json")
    assert not (tmp_path / "vllm.json").exists()


@pytest.mark.parametrize(
    ("arguments", "cuda", "message"),
    [
        ((), False, "needs a CUDA device"),
        ((), True, "vLLM is not installed: pip install vllm, or name a folder that has it by --site"),
        (("--case", "8192"), True, "'8192' is no case: give CONTEXTxBATCH, such as 8192x32, of at most 32768x64"),
        (("--case", "8192x65"), True, "'8192x65' is no case"),
    ],
)
def test_errors(monkeypatch, capsys, tmp_path, arguments, cuda, message):
    monkeypatch.setattr(vllm.PathFinder, "find_spec", lambda *args: None)
    with pytest.raises(SystemExit):
        program(monkeypatch, *arguments, "--out", tmp_path / "vllm.json", cuda=cuda)
    assert message in capsys.readouterr().err
