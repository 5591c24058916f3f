"""Masked diffusion with the exact denoiser of a world small enough to enumerate: the bound, the samplers, guidance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import rng
from ctg_jax.models import masked, unmasking
from ctg_jax.models.decoder import Transformer
from ctg_jax.models.unmasking import NEVER, blocks, first_order, order, step_count, unmask
from ctg_jax.types import InputError

V, N, DRAWS = 3, 4, 4096
LM = worlds.Bigram(V)
PARAMS = worlds.table([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.1, 0.4]])
EVERY = worlds.sequences(LM, N)
TRUTH = worlds.probabilities(LM, PARAMS, [0], N)
TRUTH = TRUTH / TRUTH.sum()
CLASS = np.random.default_rng(0).uniform(0.05, 0.95, len(EVERY))  # p(class 1 | text)
NET = Transformer.gpt2(vocab=V + 1, width=8, depth=2, heads=2, context=N, causal=False)


PARTLY = worlds.sequences(worlds.Bigram(V + 1), N)  # every row with any of its tokens masked


def exact(p):
    """The denoiser that gives the true conditional distributions under p [V^N], as a look-up. It gives the mask
    a probability too, which must not matter."""
    fits = ((PARTLY[:, None] == EVERY[None]) | (PARTLY[:, None] == V)).all(-1)
    with np.errstate(divide="ignore"):
        z = np.log(np.einsum("bk,k,knv->bnv", fits, p, np.eye(V)[EVERY]))
    z = jnp.asarray(np.concatenate([z, np.full((*PARTLY.shape, 1), 3.0)], axis=-1), jnp.float32)
    return lambda x: z[x @ (V + 1) ** jnp.arange(N)[::-1]]


TRUE = exact(TRUTH)
JOINT = exact(TRUTH * CLASS)


def truthful(x, truth):
    return masked.nats(TRUE(x), x, truth)


def wrong(x):
    """A denoiser that knows the tokens' own distributions and nothing of what they have to do with each other."""
    return TRUE(jnp.full_like(x, V))


def quadrature(denoise, schedule):
    """float64 [V^N]: the bound itself, by Gauss's rule over t and a sum over all masks."""
    nodes, weights = np.polynomial.legendre.leggauss(96)
    t = jnp.asarray((nodes + 1) / 2, jnp.float32)
    gone_at, w = (np.asarray(f(t, schedule), np.float64) for f in (masked.share, masked.weight))
    total = np.zeros(len(EVERY))
    for gone in worlds.sequences(worlds.Bigram(2), N).astype(bool):
        x = jnp.asarray(np.where(gone[None], V, EVERY))
        z = np.asarray(masked.subs(denoise(x), x), np.float64)
        z = z - np.log(np.exp(z).sum(-1, keepdims=True))
        nats = -np.take_along_axis(z, EVERY[:, :, None], 2)[:, :, 0].sum(1)
        total += nats * (weights / 2 * w * (1 - gone_at) ** (~gone).sum() * gone_at ** gone.sum()).sum()
    return total


@pytest.mark.parametrize("schedule", masked.SCHEDULES)
def test_the_bound_is_tight_for_the_exact_denoiser_and_above_for_another(schedule):
    np.testing.assert_allclose(quadrature(TRUE, schedule), -np.log(TRUTH), rtol=2e-4)
    loose = quadrature(wrong, schedule)
    independent = TRUTH @ loose
    entropy = -TRUTH @ np.log(TRUTH)
    assert independent > entropy + 0.1
    np.testing.assert_allclose(loose, quadrature(wrong, "loglinear"), rtol=2e-4)  # and depends on no schedule
    by_sets = worlds.masked_bound(lambda x, truth: masked.nats(wrong(jnp.asarray(x)), x, truth), EVERY, V)
    np.testing.assert_allclose(loose, by_sets, rtol=2e-4)


@pytest.mark.parametrize("schedule", masked.SCHEDULES)
def test_the_estimate_is_unbiased_and_draws_of_a_row_do_better_than_as_many_apart(schedule):
    row = EVERY[37]
    keys = jax.random.split(jax.random.key(1), 8192)

    @functools.partial(jax.jit, static_argnames="draws")
    def nats(draws):
        rows = jnp.broadcast_to(jnp.asarray(row)[None], (len(keys), N))
        return masked.nelbo(truthful, rows, keys, V, schedule=schedule, draws=draws)

    one, four = np.asarray(nats(1), np.float64), np.asarray(nats(4), np.float64)
    for found in (one, four):
        assert abs(found.mean() + np.log(TRUTH[37])) < 4 * found.std() / len(keys) ** 0.5
    if schedule == "cosine":  # the others have no finite variance
        assert four.var() < 0.9 * one.var() / 4


def draws(denoise, *, hidden=None, start=None, seed=0, final=0, rows=DRAWS, by="time", **plan):
    """float64 [V^N]: the share of each text among sampled rows."""
    keys = rng.per_example(jax.random.key(seed), jnp.arange(rows))
    hidden = jnp.ones((rows, N), bool) if hidden is None else jnp.broadcast_to(hidden[None], (rows, N))
    start = jnp.full((rows, N), V) if start is None else jnp.broadcast_to(start[None], (rows, N))

    @jax.jit
    def sampled(keys):
        part = blocks(hidden, plan.get("block", 0))
        when = order(rng.at_step(keys, 1 << 20), hidden, part, **{k: v for k, v in plan.items() if k != "block"})
        steps = step_count(N, **{k: v for k, v in plan.items() if k != "schedule"})
        return unmask(denoise, start, when, keys, steps=steps, final=final, by=by, part=part)[0]

    found = np.asarray(sampled(keys)) @ V ** np.arange(N)[::-1]
    return np.bincount(found, minlength=V**N) / rows


def far(found, truth):
    """Total variation in units of what a sample of this size has by chance: about 1 where the distribution is right."""
    chance = np.sqrt(2 * truth * (1 - truth) / np.pi / DRAWS).sum() / 2
    return np.abs(found - truth).sum() / 2 / chance


@pytest.mark.parametrize(
    "plan", [dict(), dict(block=1), dict(block=3), dict(steps=64), dict(steps=64, schedule="cosine")], ids=str
)
def test_samples_have_the_true_distribution(plan):
    assert far(draws(TRUE, **plan), TRUTH) < 1.25


@pytest.mark.parametrize("by", ["left", "right", "certain", "uncertain"])
def test_one_token_a_step_has_the_true_distribution_in_any_order_that_looks_at_what_is_written(by):
    assert far(draws(TRUE, by=by), TRUTH) < 1.25


def test_orders_by_certainty_by_hand():
    """Entropies of three places: 0.33, ln 3 and 0.80; the token that was drawn does not matter."""
    p = np.asarray([[0.9, 0.1, 0], [1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]])
    with np.errstate(divide="ignore"):
        z = jnp.asarray(np.log(p), jnp.float32)[None]
    best = jnp.asarray([[1, 0, 2]])
    order_of = lambda by: np.argsort(-np.asarray(unmasking._scores(by, z, best))[0]).tolist()  # noqa: E731
    assert order_of("certain") == [0, 2, 1] and order_of("uncertain") == [1, 2, 0]
    assert order_of("left") == [0, 1, 2] and order_of("right") == [2, 1, 0]
    assert order_of("confidence")[0] == 1  # ln 1/3 of place 1, and ln .1 of the two others


def test_the_objective_of_film_is_the_mean_over_masked_tokens_at_its_rate():
    """With a uniform rate the number of masked tokens is uniform over 0 to N, and 0 counts as N: a fifth each for 1 to
    3, and two fifths for 4."""
    row, keys = EVERY[37], jax.random.split(jax.random.key(1), 20000)
    rows = jnp.broadcast_to(jnp.asarray(row)[None], (len(keys), N))
    nats, count = jax.jit(lambda: masked.film(truthful, rows, keys, V, (1.0, 1.0)))()
    shares = np.bincount(np.asarray(count, int), minlength=N + 1) / len(keys)
    np.testing.assert_allclose(shares, [0, 0.2, 0.2, 0.2, 0.4], atol=0.015)
    every = np.asarray([g for g in worlds.sequences(worlds.Bigram(2), N).astype(bool) if g.any()])
    of_mask = np.asarray(truthful(jnp.asarray(np.where(every, V, row[None])), jnp.asarray(row)[None].repeat(15, 0)))
    each = of_mask.sum(1) / every.sum(1)
    by_count = np.asarray([each[every.sum(1) == k].mean() for k in range(1, N + 1)])
    expected = by_count @ [0.2, 0.2, 0.2, 0.4]
    assert float(jnp.mean(nats / count)) == pytest.approx(expected, rel=0.02)
    # The bound in any order is the sum over orders and places: the mean over each number of masked tokens, times N.
    assert by_count.sum() == pytest.approx(-np.log(TRUTH[37]), rel=1e-4)


def test_few_steps_do_not():
    """All tokens at once are as if independent; blocks of one token are exact however few steps a block has."""
    assert far(draws(TRUE, steps=1), TRUTH) > 3
    assert far(draws(TRUE, steps=4), TRUTH) < far(draws(TRUE, steps=1), TRUTH)
    assert far(draws(TRUE, steps=1, block=1), TRUTH) < 1.25
    assert far(draws(wrong), TRUTH) > 3


def test_infilling_is_the_conditional_distribution():
    given = np.array([False, True, False, True])
    start = jnp.array([V, 2, V, 1])
    fits = (EVERY[:, 1] == 2) & (EVERY[:, 3] == 1)
    found = draws(TRUE, hidden=jnp.asarray(~given), start=start)
    assert found[~fits].sum() == 0
    assert far(found, np.where(fits, TRUTH, 0) / TRUTH[fits].sum()) < 1.25


def ratio(x):
    """log p(class 1 | x with v at a place) - log p(class 1 | x), exactly."""
    both, text = JOINT(x)[:, :, :V], TRUE(x)[:, :, :V]
    now = jax.nn.logsumexp(both, axis=-1, keepdims=True) - jax.nn.logsumexp(text, axis=-1, keepdims=True)
    found = jnp.where(jnp.isfinite(text), both - text - now, 0.0)
    return jnp.pad(found, ((0, 0), (0, 0), (0, 1)))


@pytest.mark.parametrize("plan", [dict(), dict(steps=64)], ids=str)
def test_guidance_by_the_exact_classifier_reaches_the_posterior(plan):
    posterior = TRUTH * CLASS / (TRUTH @ CLASS)
    found = draws(lambda x: TRUE(x) + ratio(x), **plan)
    assert far(found, posterior) < 1.25 < 2 < far(found, TRUTH)


def test_first_order_is_exact_where_the_log_is_linear_in_the_embeddings():
    r = np.random.default_rng(2)
    table, push = (jnp.asarray(r.normal(size=s), jnp.float32) for s in [(V + 1, 5), (N, 5)])
    x = jnp.array([[0, V, 2, V]])

    def log_f(x):
        return jnp.sum(table[x] * push[None])

    found = first_order(push[None], table, V)
    for at in (1, 3):
        for v in range(V):
            assert float(found[0, at, v]) == pytest.approx(float(log_f(x.at[0, at].set(v)) - log_f(x)), abs=1e-5)


def test_rows_and_steps():
    """A row alone is the row in its batch; steps at which nothing is written cost no call and change nothing."""
    params = worlds.lively(NET)
    keys = rng.per_example(jax.random.key(3), jnp.arange(6))
    hidden = jnp.asarray(np.random.default_rng(4).random((6, N)) < 0.8)
    x = jnp.where(hidden, V, 1)

    @functools.partial(jax.jit, static_argnames="cache")
    def run(x, hidden, keys, cache=True):
        denoise = functools.partial(masked.denoise, NET, params)
        when = order(keys, hidden, steps=32)
        return *unmask(denoise, x, when, keys, steps=32, cache=cache), when

    rows, calls, when = run(x, hidden, keys)
    again, every, _ = run(x, hidden, keys, cache=False)
    np.testing.assert_array_equal(rows, again)
    assert int(calls) == len(set(np.asarray(when).ravel()) - {NEVER}) < int(every) == 32
    assert int(jnp.max(rows)) < V and bool(jnp.all(jnp.where(hidden, True, rows == 1)))
    for i in (0, 4):
        alone, _, _ = run(x[i : i + 1], hidden[i : i + 1], keys[i : i + 1])
        np.testing.assert_array_equal(alone[0], rows[i])


@pytest.mark.parametrize("block", [0, 2])
def test_the_most_probable_tokens_are_written_first(block):
    """A denoiser that is the surer the farther right: each step writes the rightmost open tokens of its block, as many
    as the forward process has in that step."""
    sure = jnp.broadcast_to(
        jnp.arange(N, dtype=jnp.float32)[None, :, None] * jnp.eye(V + 1)[1][None, None], (1, N, V + 1)
    )
    keys, hidden = rng.per_example(jax.random.key(0), jnp.arange(40)), jnp.ones((40, N), bool)
    part = blocks(hidden, block)
    when = order(keys, hidden, part, steps=2)
    steps = step_count(N, steps=2, block=block)
    seen = []

    def denoise(x):
        seen.append(np.asarray(x == V))
        return jnp.broadcast_to(sure, (len(x), N, V + 1))

    x = jnp.full((40, N), V)
    with jax.disable_jit():
        rows, _ = unmask(
            denoise,
            x,
            when,
            keys,
            steps=steps,
            greedy=True,
            cache=False,
            by="confidence",
            part=part,
        )
    assert bool(jnp.all(rows < V))
    seen.append(np.zeros((40, N), bool))
    for i in range(steps):
        wrote = seen[i] & ~seen[i + 1]
        count = np.asarray(when == i).sum(1)
        np.testing.assert_array_equal(wrote.sum(1), count)
        for row, left, n in zip(wrote, seen[i], count):
            here = np.arange(N) // block == i // 2 if block else np.ones(N, bool)
            np.testing.assert_array_equal(np.flatnonzero(row), np.flatnonzero(left & here)[::-1][:n][::-1])


def test_orders_by_hand():
    keys = jax.random.split(jax.random.key(5), 2000)
    hidden = jnp.broadcast_to(jnp.array([True, False, True, True, True])[None], (2000, 5))
    one = blocks(hidden, 1)
    np.testing.assert_array_equal(order(keys, hidden, one)[7], [0, NEVER, 1, 2, 3])
    np.testing.assert_array_equal(order(keys, hidden, one, steps=1)[7], [0, NEVER, 1, 2, 3])
    np.testing.assert_array_equal(order(keys, hidden, blocks(hidden, 1, whole=True), steps=1)[7], [0, NEVER, 2, 3, 4])
    np.testing.assert_array_equal(blocks(hidden, 2, whole=True)[7], [0, 0, 1, 1, 2])
    both = np.asarray(order(keys, hidden, blocks(hidden, 2)))
    assert set(map(tuple, both[:, [0, 2]])) == {(0, 1), (1, 0)} and set(both[:, 3]) == {2, 3}
    when = np.asarray(order(keys, hidden, steps=4, schedule="cosine"))[:, [0, 2, 3, 4]]
    share = np.bincount(when.ravel(), minlength=4) / when.size
    np.testing.assert_allclose(share, -np.diff(np.sin(np.pi / 2 * np.array([1, 0.75, 0.5, 0.25, 0])) ** 2), atol=0.02)


def test_final_steps_and_greedy_take_the_most_likely():
    best = EVERY[np.argmax(TRUTH)]
    marginal = np.array([np.bincount(EVERY[:, n], TRUTH).argmax() for n in range(N)])
    at = {tuple(row): i for i, row in enumerate(EVERY.tolist())}
    assert draws(TRUE, steps=1, final=1, rows=8)[at[tuple(marginal)]] == 1
    x, keys = jnp.full((1, N), V), jax.random.split(jax.random.key(0), 1)
    when = order(keys, x == V, blocks(x == V, 1))
    row, _ = unmask(TRUE, x, when, keys, steps=N, greedy=True)
    np.testing.assert_array_equal(row[0], [np.bincount(EVERY[:, 0], TRUTH).argmax(), *row[0, 1:]])
    assert TRUTH[at[tuple(np.asarray(row)[0].tolist())]] <= TRUTH[at[tuple(best.tolist())]]


def test_subs():
    z = jnp.array([[[1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0, 9.0]]])
    found = jax.nn.softmax(masked.subs(z, jnp.array([[V, 1]])), axis=-1)[0]
    np.testing.assert_allclose(found[0], [*jax.nn.softmax(z[0, 0, :3]), 0], rtol=1e-6)
    np.testing.assert_array_equal(found[1], [0, 1, 0, 0])


def test_the_network_reads_both_sides_and_has_no_cache():
    params = worlds.lively(NET)
    a = masked.denoise(NET, params, jnp.array([[0, 1, V, 2]]))
    b = masked.denoise(NET, params, jnp.array([[0, 1, V, 1]]))
    assert float(jnp.max(jnp.abs(a[:, 0] - b[:, 0]))) > 1e-3
    with pytest.raises(InputError, match="causal=False reads whole rows"):
        NET.init_cache(params, 1, 4)


def test_bad_input():
    with pytest.raises(InputError, match="schedule is 'sqrt', expected one of loglinear, linear, cosine"):
        masked.share(jnp.float32(0.5), "sqrt")
    with pytest.raises(InputError, match="draws is 0"):
        masked.nelbo(truthful, jnp.zeros((1, N), jnp.int32), jax.random.split(jax.random.key(0), 1), V, draws=0)
