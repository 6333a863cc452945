import math
import warnings
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hardkv.selectors import solvers
from hardkv.selectors.temperatures import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    _prepare,
    fit_temperatures,
    kept_counts,
)

SOLVERS = ["adam", "bisect"]
ROUNDING = 1e-9  # of shares


# The oracle: float64, one sample at a time, nothing sorted twice or clever.


def oracle_aim(reference, mask, p, given=None):
    """m, M, p_c of one sample. Where rounding decides whether m tokens hold p_c, `given` may be either m, no other."""
    candidates = sorted((float(a) for a, c in zip(reference, mask, strict=True) if c), reverse=True)
    credit = sum(float(a) for a, c in zip(reference, mask, strict=True) if not c)
    if p == 1:
        return len(candidates), 1.0, 1.0
    if not sum(candidates) > 0:
        return 0, 0.0, 0.0
    p_c = (p - credit) / (1 - credit) if credit < p else 0.0
    shares = [0.0, *accumulate(a / sum(candidates) for a in candidates)]

    def smallest(target):
        return next((m for m, share in enumerate(shares) if share >= target), len(candidates))

    m = smallest(p_c)
    if given is not None:
        assert smallest(p_c - ROUNDING) <= given <= smallest(p_c + ROUNDING)
        m = given
    return m, shares[m], p_c


def oracle_shares(z, mask, temperature):
    """Softmax over the candidates of z / T, best first."""
    logits = np.sort(np.asarray(z, dtype=np.float64)[np.asarray(mask)])[::-1] / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def oracle_loss(z, reference, mask, p, temperature, counts=None):
    """The loss of one row, samples of `[S, N]`, and how many it uses; `counts [S]`: m, as in `oracle_aim`."""
    loss, used = 0.0, 0
    for s in range(len(z)):
        m, aim, _ = oracle_aim(reference[s], mask[s], p, None if counts is None else int(counts[s]))
        if 0 < m < mask[s].sum():
            loss += (oracle_shares(z[s], mask[s], temperature)[:m].sum() - aim) ** 2
            used += 1
    return loss, used


def oracle_count(z, reference, mask, p, temperature):
    """What TopP(p) keeps of one sample."""
    _, _, p_c = oracle_aim(reference, mask, p)
    if p == 1:
        return int(mask.sum())
    share = 0.0
    for kept, mass in enumerate(oracle_shares(z, mask, temperature)):
        if share >= p_c:
            return kept
        share += mass
    return int(mask.sum())


def attention(rows, samples, tokens, seed, sharpness=(1.0, 4.0)):
    generator = torch.Generator().manual_seed(seed)
    low, high = sharpness
    spread = low + (high - low) * torch.rand(rows, 1, 1, generator=generator, dtype=torch.float64)
    return (torch.randn(rows, samples, tokens, generator=generator, dtype=torch.float64) * spread).softmax(-1)


def noise(like, seed):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def protect(reference, sinks=2, window=5):
    mask = torch.ones_like(reference, dtype=torch.bool)
    mask[..., :sinks] = False
    mask[..., reference.shape[-1] - window :] = False
    return mask


def max_pooled(reference):
    return torch.nn.functional.max_pool1d(reference, 7, stride=1, padding=3).log()


# What the definition promises


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("samples", [1, 4])
def test_log_attention_needs_no_temperature(solver, p, samples):
    reference = attention(6, samples, 200, seed=0).float()
    fit = fit_temperatures(reference.log(), reference, p, protect(reference), solver)
    torch.testing.assert_close(fit.temperatures, torch.ones(6), atol=1e-3, rtol=0)
    assert fit.residuals.max() < 1e-6
    assert not fit.clamped.any()
    assert not fit.unfitted.any()
    assert (fit.samples == samples).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("a", [0.01, 0.3, 2.5, 100.0])
@pytest.mark.parametrize("samples", [1, 4])
def test_scaling_scores_scales_temperature(solver, a, samples):
    reference = attention(6, samples, 200, seed=1).float()
    mask = protect(reference)
    fit = fit_temperatures(a * reference.log() + 7, reference, 0.9, mask, solver)
    torch.testing.assert_close(fit.temperatures, torch.full((6,), a), atol=0, rtol=1e-3)

    z = reference.log() + noise(reference, seed=2)
    before, _ = fit_temperatures(z, reference, 0.9, mask, solver)
    after, _ = fit_temperatures(a * z, reference, 0.9, mask, solver)
    torch.testing.assert_close(after, a * before, atol=0, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("p", [0.6, 0.95])
def test_one_sample_is_solved(solver, seed, p):
    reference = attention(10, 1, 120, seed)
    z, mask = reference.log() * 3 + noise(reference, seed), protect(reference)
    fit = fit_temperatures(z, reference, p, mask, solver)
    for r in range(10):
        loss, used = oracle_loss(z[r].numpy(), reference[r].numpy(), mask[r].numpy(), p, float(fit.temperatures[r]))
        assert used == fit.samples[r] == 1
        assert loss < 1e-10
        assert fit.residuals[r] == pytest.approx(math.sqrt(loss), abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("p", [0.7, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["pooled", "noisy", "unrelated", "scaled"])
def test_several_samples_reach_the_dense_grid_minimum(solver, seed, p, kind):
    reference = attention(5, 4, 60, seed, sharpness=(0.5, 5.0))
    z = {
        "pooled": max_pooled(reference),
        "noisy": reference.log() + 3 * noise(reference, seed + 1),
        "unrelated": noise(reference, seed + 1),
        "scaled": 100 * (reference.log() + noise(reference, seed + 1)) * torch.tensor([0.1, 0.3, 1.0, 0.6])[:, None],
    }[kind]
    mask = protect(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fit = fit_temperatures(z, reference, p, mask, solver)
    log_t = np.linspace(math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE), 4001)
    for r in range(5):
        grid_loss = np.zeros_like(log_t)
        for s in range(4):
            m, aim, _ = oracle_aim(reference[r, s].numpy(), mask[r, s].numpy(), p)
            if 0 < m < int(mask[r, s].sum()):
                logits = np.sort(z[r, s][mask[r, s]].numpy())[::-1] / np.exp(log_t)[:, None]
                weights = np.exp(logits - logits[:, :1])
                grid_loss += (weights[:, :m].sum(-1) / weights.sum(-1) - aim) ** 2
        loss, used = oracle_loss(z[r].numpy(), reference[r].numpy(), mask[r].numpy(), p, float(fit.temperatures[r]))
        assert loss <= 1.01 * grid_loss.min() + 1e-9
        assert fit.residuals[r] == pytest.approx(math.sqrt(loss / used), abs=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_adam_and_bisect_agree(solver):
    reference = attention(8, 6, 150, seed=3).float()
    z = max_pooled(reference)
    adam = fit_temperatures(z, reference, 0.9, solver="adam")
    bisect = fit_temperatures(z, reference, 0.9, solver="bisect")
    torch.testing.assert_close(adam.residuals, bisect.residuals, atol=1e-6, rtol=5e-3)


# What it is for: counts


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_counts_of_rescaled_attention_become_exact(solver, p):
    reference = attention(30, 1, 300, seed=4)
    z, mask = 3.6 * reference.log(), protect(reference)
    fit = fit_temperatures(z, reference, p, mask, solver)
    assert torch.equal(kept_counts(z, fit.temperatures, reference, p, mask), fit.counts)
    assert not torch.equal(kept_counts(z, None, reference, p, mask), fit.counts)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(3))
def test_counts_of_distinct_scores(solver, seed):
    """Equal to m where the m-th mass exceeds what M overshoots; elsewhere less, never more."""
    p, reference = 0.9, attention(30, 1, 120, seed)
    z, mask = reference.log() + 2 * noise(reference, seed), protect(reference)
    fit = fit_temperatures(z, reference, p, mask, solver)
    kept = kept_counts(z, fit.temperatures, reference, p, mask)
    exact = 0
    for r in range(30):
        m, aim, p_c = oracle_aim(reference[r, 0].numpy(), mask[r, 0].numpy(), p)
        slack = oracle_shares(z[r, 0].numpy(), mask[r, 0].numpy(), float(fit.temperatures[r]))[m - 1] - (aim - p_c)
        assert abs(slack) > 1e-6
        assert aim - p_c > 1e-6
        assert fit.counts[r] == m
        assert (kept[r] == m) if slack > 0 else (m - 3 <= kept[r] < m)
        exact += int(slack > 0)
    assert exact >= 20


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("seed", range(3))
def test_counts_of_max_pooled_scores_improve(solver, seed):
    reference = attention(12, 8, 256, seed, sharpness=(1.5, 3.0)).float()
    z, mask = max_pooled(reference), protect(reference)
    fit = fit_temperatures(z, reference, 0.9, mask, solver)
    before = (kept_counts(z, None, reference, 0.9, mask) - fit.counts).abs().median()
    after = (kept_counts(z, fit.temperatures, reference, 0.9, mask) - fit.counts).abs().median()
    assert after < 0.3 * before


@pytest.mark.parametrize("seed", range(3))
def test_kept_counts_is_top_p(seed):
    reference = attention(4, 3, 40, seed)
    mask = torch.rand(reference.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    z = noise(reference, seed + 10)
    temperatures = torch.tensor([0.1, 0.7, 1.0, 5.0])
    for p in (0.1, 0.5, 0.93, 1.0):
        kept = kept_counts(z, temperatures, reference, p, mask)
        raw = kept_counts(reference.log(), None, reference, p, mask)
        assert torch.equal(raw, fit_temperatures(z, reference, p, mask, "bisect").counts)
        for r in range(4):
            for s in range(3):
                sample = (z[r, s].numpy(), reference[r, s].numpy(), mask[r, s].numpy())
                assert kept[r, s] == oracle_count(*sample, p, float(temperatures[r]))
                assert raw[r, s] == oracle_aim(*sample[1:], p)[0]


# Degenerate rows


def only(tensor):
    return tensor.reshape(1, 1, -1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", ["one token", "all protected", "empty mask", "p = 1", "no tokens", "padding only"])
def test_nothing_to_fit(solver, case):
    reference, p, mask = only(torch.tensor([0.5, 0.3, 0.2])), 0.9, None
    if case == "one token":
        reference = only(torch.ones(1))
    elif case == "all protected":  # by mass: the protected token alone reaches p
        reference, mask = only(torch.tensor([0.95, 0.03, 0.02])), only(torch.tensor([False, True, True]))
    elif case == "empty mask":
        mask = torch.zeros_like(reference, dtype=torch.bool)
    elif case == "p = 1":
        p = 1
    elif case == "no tokens":
        reference = reference[..., :0]
    elif case == "padding only":
        reference, mask = torch.zeros_like(reference), torch.zeros_like(reference, dtype=torch.bool)
    fit = fit_temperatures(noise(reference, 0), reference, p, mask, solver)
    temperatures, residuals = fit
    assert temperatures.tolist() == [1.0]
    assert residuals.tolist() == [0.0]
    assert fit.unfitted.tolist() == [True]
    assert fit.clamped.tolist() == [False]
    assert fit.samples.tolist() == [0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty_dimensions(solver, shape):
    fit = fit_temperatures(torch.zeros(shape), torch.zeros(shape), 0.9, solver=solver)
    assert fit.temperatures.tolist() == [1.0] * shape[0]
    assert fit.unfitted.all()
    assert fit.counts.shape == shape[:2]


@pytest.mark.parametrize("solver", SOLVERS)
def test_uniform_scores_leave_temperature_at_one_and_tell(solver):
    reference = attention(1, 2, 50, seed=0)
    fit = fit_temperatures(torch.zeros_like(reference), reference, 0.9, solver=solver)
    assert fit.temperatures.tolist() == [1.0]
    assert fit.unfitted.all()
    assert fit.samples.tolist() == [2]
    loss, _ = oracle_loss(np.zeros((2, 50)), reference[0].numpy(), np.ones((2, 50), dtype=bool), 0.9, 1.0)
    assert fit.residuals[0] == pytest.approx(math.sqrt(loss / 2))
    assert loss > 0.01


@pytest.mark.parametrize("solver", SOLVERS)
def test_uniform_reference_flattens_as_far_as_allowed(solver):
    reference = torch.full((2, 1, 50), 1 / 50)
    with pytest.warns(UserWarning, match="2 of 2 temperatures stopped at the limits"):
        fit = fit_temperatures(noise(reference, 0) * 100, reference, 0.89, solver=solver)
    assert fit.clamped.all()
    assert not fit.unfitted.any()
    torch.testing.assert_close(fit.temperatures, torch.full((2,), MAX_TEMPERATURE), atol=0, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_hot_reference(solver):
    reference = torch.zeros(3, 1, 20)
    reference[..., 4] = 1
    z = torch.stack((reference[0], reference[1] * 50, (reference[2] + 1e-30).log()))
    fit = fit_temperatures(z, reference, 0.9, solver=solver)
    assert fit.residuals.max() < 1e-5
    assert not fit.clamped.any()
    assert (fit.counts == 1).all()
    assert fit.temperatures[0] < 0.1  # scores of 1 against 0 are far too flat
    assert fit.temperatures[1:].tolist() == [1.0, 1.0]  # these are sharp enough as they are
    fit = fit_temperatures(reference.log(), reference, 0.9, solver=solver)  # -inf: candidates without mass
    assert fit.temperatures.tolist() == [1.0] * 3
    assert fit.unfitted.all()
    assert fit.residuals.tolist() == [0.0] * 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_minus_infinity_and_all_minus_infinity(solver):
    reference = attention(2, 2, 40, seed=5)
    z = 2 * reference.log()
    z[:, :, 30:] = -math.inf
    z[1] = -math.inf
    fit = fit_temperatures(z, reference, 0.8, solver=solver)
    assert fit.temperatures.isfinite().all()
    assert fit.samples.tolist() == [2, 0]
    loss, _ = oracle_loss(
        z[0].numpy(), reference[0].numpy(), np.ones((2, 40), dtype=bool), 0.8, float(fit.temperatures[0])
    )
    assert fit.residuals[0] == pytest.approx(math.sqrt(loss / 2), abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_plateau_that_cannot_be_cut_shows_in_the_residual(solver):
    """Four equal best scores, one token to keep: its share ends at a quarter however cold it gets."""
    reference = only(torch.tensor([0.9, 0.02, 0.02, 0.02, 0.02, 0.02]))
    fit = fit_temperatures(only(torch.tensor([0.0, 0.0, 0.0, 0.0, -1.0, -2.0])), reference, 0.85, solver=solver)
    assert fit.counts.item() == 1
    assert not fit.unfitted.any()
    assert not fit.clamped.any()
    assert fit.residuals[0] == pytest.approx(0.9 - 0.25, abs=1e-5)
    assert fit.temperatures[0] < 0.2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("scale", "limit"), [(1e-6, MIN_TEMPERATURE), (1e6, MAX_TEMPERATURE)])
def test_clamping_is_reported(solver, scale, limit):
    reference = attention(3, 2, 50, seed=6)
    scales = torch.tensor([1.0, scale, 1.0])[:, None, None]
    with pytest.warns(UserWarning, match="1 of 3 temperatures"):
        fit = fit_temperatures(scales * reference.log(), reference, 0.9, solver=solver)
    assert fit.clamped.tolist() == [False, True, False]
    assert fit.temperatures[1] == pytest.approx(limit)
    assert fit.residuals[1] > 0.01
    assert fit.temperatures[0] == pytest.approx(1, abs=1e-3)


# How it is computed


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_are_independent(solver):
    reference = attention(7, 3, 80, seed=7).float()
    z = reference.log() * 10.0 ** torch.arange(-3, 4)[:, None, None] + noise(reference, 8)
    z[3] = 0  # one that cannot be fitted among them
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        together = fit_temperatures(z, reference, 0.9, solver=solver)
        alone = [fit_temperatures(z[r : r + 1], reference[r : r + 1], 0.9, solver=solver) for r in range(7)]
    torch.testing.assert_close(together.temperatures, torch.cat([fit.temperatures for fit in alone]), atol=0, rtol=1e-5)
    assert together.unfitted.tolist() == [bool(fit.unfitted) for fit in alone]


def test_adam_moves_its_leaf(monkeypatch):
    """The paper's code optimises a tensor that its loss does not read and always returns the 0.5 it began with."""
    reference = attention(4, 3, 100, seed=9)
    z = reference.log() * torch.tensor([0.13, 0.71, 3.7, 29.0])[:, None, None]
    leaves = []
    adam = torch.optim.Adam

    def spy(parameters, **settings):
        leaves.extend(parameters)
        return adam(parameters, **settings)

    monkeypatch.setattr(torch.optim, "Adam", spy)
    start = fit_temperatures(z, reference, 0.9, max_steps=1).temperatures
    fit = fit_temperatures(z, reference, 0.9)
    assert all(leaf.is_leaf and leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in leaves)
    assert ((fit.temperatures - start).abs() > 1e-4 * start).all()  # the optimiser itself, not only where it starts
    torch.testing.assert_close(fit.temperatures, torch.tensor([0.13, 0.71, 3.7, 29.0]).double(), atol=0, rtol=1e-4)


@pytest.mark.parametrize("offset", [-0.4, -0.1, 0.1, 0.4])
def test_adam_alone_finds_the_way(offset):
    reference = attention(6, 3, 100, seed=9)
    problem = _prepare(3.7 * reference.log(), reference, 0.9, protect(reference))
    with torch.no_grad():
        log_t = solvers.adam(problem, torch.full((6,), math.log(3.7) + offset).double(), 300, 1e-6)
    torch.testing.assert_close(log_t.exp(), torch.full((6,), 3.7).double(), atol=0, rtol=1e-3)


def test_derivative_is_exact():
    z = noise(torch.empty(2, 3, 9, dtype=torch.float64), 0).sort(-1, descending=True).values
    z[0, 0, 6:] = solvers.DEAD
    m = torch.tensor([[1, 4, 8], [2, 2, 5]])
    log_t = noise(torch.empty(2, 3, dtype=torch.float64), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: solvers._RestMass.apply(x, z - z[..., :1], m), log_t)


@pytest.mark.parametrize("solver", SOLVERS)
def test_blocks_do_not_matter(solver, monkeypatch):
    reference = attention(5, 3, 64, seed=10).float()
    z = max_pooled(reference)
    whole = fit_temperatures(z, reference, 0.9, solver=solver)
    monkeypatch.setattr(solvers, "_CPU_BLOCK", 100)
    torch.testing.assert_close(fit_temperatures(z, reference, 0.9, solver=solver).temperatures, whole.temperatures)


@pytest.mark.parametrize("solver", SOLVERS)
def test_padding_and_order_do_not_matter(solver):
    reference = attention(3, 2, 50, seed=11)
    z, mask = max_pooled(reference), protect(reference)
    plain = fit_temperatures(z, reference, 0.9, mask, solver)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    padded = [
        torch.nn.functional.pad(tensor, (0, 10), value=value)[..., order]
        for tensor, value in ((z, math.nan), (reference, 0.0), (mask, False))
    ]
    fit = fit_temperatures(padded[0], padded[1], 0.9, padded[2], solver)
    torch.testing.assert_close(fit.temperatures, plain.temperatures, atol=0, rtol=1e-4)
    assert torch.equal(fit.counts, plain.counts)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_and_arguments_untouched(solver, mode):
    with mode():
        reference = attention(2, 2, 40, seed=12)
        z = (2 * reference.log()).requires_grad_(mode is torch.enable_grad)
        copies = z.detach().clone(), reference.clone()
        fit = fit_temperatures(z, reference, 0.9, solver=solver)
        assert torch.equal(z, copies[0])
        assert torch.equal(reference, copies[1])
        assert z.grad is None
    torch.testing.assert_close(fit.temperatures, torch.full((2,), 2.0).double(), atol=0, rtol=1e-4)
    assert not fit.temperatures.requires_grad
    assert not fit.residuals.requires_grad


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_dtypes(given_dtype, dtype):
    reference = attention(2, 2, 40, seed=13).to(given_dtype)  # bfloat16 rows do not sum to one exactly
    temperatures, residuals = fit_temperatures(reference.log(), reference, 0.9)
    assert temperatures.dtype == residuals.dtype == dtype
    torch.testing.assert_close(temperatures, torch.ones(2, dtype=dtype), atol=0.05, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    samples=st.integers(1, 3),
    tokens=st.integers(1, 24),
    p=st.floats(0.05, 0.999),
    sharpness=st.floats(0.0, 8.0),
    scale=st.floats(0.01, 100.0),
    levels=st.sampled_from([2, 5, 10**6]),
    solver=st.sampled_from(SOLVERS),
)
@example(seed=0, rows=1, samples=1, tokens=6, p=0.5, sharpness=0.0, scale=1.0, levels=2, solver="adam")  # m: 2 or 3
def test_any_input(seed, rows, samples, tokens, p, sharpness, scale, levels, solver):
    """Plateaus, tiny rows, random masks: the fit is never worse than T = 1 or than any of a few other T."""
    reference = attention(rows, samples, tokens, seed, sharpness=(0.0, sharpness))
    mask = torch.rand(reference.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    z = scale * (noise(reference, seed) * levels / 4).round() * 4 / levels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fit = fit_temperatures(z, reference, p, mask, solver)
    assert ((fit.temperatures >= 0.999 * MIN_TEMPERATURE) & (fit.temperatures <= 1.001 * MAX_TEMPERATURE)).all()
    for r in range(rows):
        row = (z[r].numpy(), reference[r].numpy(), mask[r].numpy(), p)
        loss, used = oracle_loss(*row, float(fit.temperatures[r]), fit.counts[r])
        assert used == fit.samples[r]
        assert fit.residuals[r] == pytest.approx(math.sqrt(loss / max(used, 1)), abs=1e-6)
        for other in (0.003, 0.1, 1.0, 7.0, 500.0):
            assert loss <= 1.01 * oracle_loss(*row, other, fit.counts[r])[0] + 1e-8


# Arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": 0.0}, ValueError, r"p is 0.0.*\(0, 1\]"),
        ({"p": 1.5}, ValueError, "p is 1.5"),
        ({"p": math.nan}, ValueError, "p is nan"),
        ({"p": "0.9"}, ValueError, "p is '0.9'"),
        ({"p": True}, ValueError, "p is True"),
        ({"solver": "sgd"}, ValueError, "solver='sgd' is not known.*adam, bisect"),
        ({"max_steps": 0}, ValueError, "max_steps is 0"),
        ({"tolerance": 0.0}, ValueError, "tolerance is 0.0"),
        ({"scores": torch.zeros(2, 4)}, ValueError, r"scores has shape \[2, 4\].*unsqueeze"),
        ({"scores": torch.zeros(2, 1, 4, dtype=torch.int64)}, TypeError, "scores has dtype torch.int64"),
        ({"scores": torch.full((2, 1, 4), math.nan)}, ValueError, r"scores holds NaN or \+inf"),
        ({"scores": torch.full((2, 1, 4), math.inf)}, ValueError, r"scores holds NaN or \+inf"),
        ({"reference": torch.full((2, 1, 5), 0.2)}, ValueError, r"reference has shape \[2, 1, 5\].*\[2, 1, 4\]"),
        ({"reference": torch.ones(2, 1, 4, dtype=torch.bool)}, TypeError, "reference has dtype torch.bool"),
        ({"reference": torch.ones(2, 1, 4)}, ValueError, "reference has a sample that sums to 4"),
        ({"reference": torch.full((2, 1, 4), -0.1)}, ValueError, "reference holds negative"),
        ({"reference": torch.full((2, 1, 4), math.nan)}, ValueError, "reference holds negative, NaN"),
        ({"mask": torch.ones(2, 1, 4)}, TypeError, "mask has dtype torch.float32"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask has shape \[2, 4\]"),
        ({"mask": torch.ones(2, 1, 4, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"scores": torch.zeros(2, 1, 4), "reference": torch.full((2, 1, 4), 0.25), "p": 0.9}
    fit_temperatures(**arguments)
    with pytest.raises(error, match=message):
        fit_temperatures(**(arguments | change))


@pytest.mark.parametrize("temperatures", [torch.ones(3), torch.zeros(2), torch.tensor([1.0, math.nan])])
def test_bad_temperatures(temperatures):
    reference = torch.full((2, 1, 4), 0.25)
    with pytest.raises(ValueError, match=r"temperatures has shape .* must be \[2\]"):
        kept_counts(torch.zeros(2, 1, 4), temperatures, reference, 0.9)
