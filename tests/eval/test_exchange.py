"""The exchange rate between the two losses."""

import pytest
import torch

from eval import exchange
from eval.teacher_forced import teacher_forced
from hardkv import calibrate
from tests.cache import conftest as tiny


def test_rate():
    """What both kinds do per unit, of sums; the rate is their ratio."""
    lost = {"bits 4": 1.0, "bits 3": 3.0, "Risk 128": 2.0, "Risk 256": 1.0}
    kl = {"bits 4": 0.2, "bits 3": 0.2, "Risk 128": 0.5, "Risk 256": 0.1}
    assert exchange.exchange(lost, kl) == pytest.approx((0.4 / 4) / (0.6 / 3))


def test_losses_and_caches_have_the_same_names(monkeypatch):
    monkeypatch.setattr(exchange, "COUNTS", (60, 120))
    model, ids = tiny.make_model("llama"), tiny.make_prompts(1, 512)["input_ids"]
    calibration = calibrate(model, [ids], scorer="attention", interval=exchange.INTERVAL, progress=False)
    lost, caches = exchange.measured_loss(calibration, 512), exchange.caches(model, calibration, 512)
    assert list(lost) == list(caches) == ["bits 4", "bits 3", "Risk 60", "Risk 120"]
    assert lost["bits 4"] < lost["bits 3"]
    assert lost["Risk 60"] > lost["Risk 120"] > 0
    found = teacher_forced(model, ids, caches)
    assert all(torch.tensor(result.kl).isfinite().all() and result.kl[0] > 0 for result in found.values())
