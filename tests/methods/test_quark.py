"""Quark: the loss by hand, the quantiles it reaches in a world small enough to enumerate, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.decode import loop
from ctg_jax.learn import calibrate, losses
from ctg_jax.methods import quark
from ctg_jax.types import InputError

LM = worlds.tiny(vocab=5, depth=1)
PARAMS = worlds.lively(LM, factor=4)
PROMPT, NEW, K = [1, 2], 2, 4
EVERY = worlds.sequences(LM, NEW)
REWARD = np.random.default_rng(0).normal(size=len(EVERY))


def slices(p):
    """float64 [K, n]: the base's distribution within each quantile of reward; an outcome may lie in two of them."""
    order = np.argsort(REWARD, kind="stable")
    upto = np.cumsum(p[order])
    out = np.zeros((K, len(p)))
    for k in range(K):
        high, low = np.minimum(upto, (k + 1) / K), np.maximum(upto - p[order], k / K)
        out[k, order] = np.maximum(high - low, 0) * K
    return out


def test_every_token_reaches_its_quantile():
    """Conditioned on token k the policy is the base within the k-th quantile of reward, for every k."""
    base = worlds.probabilities(LM, PARAMS, PROMPT, NEW)
    draws = np.random.default_rng(1).choice(len(base), 8192, p=base / base.sum())
    bins = calibrate.bins(REWARD[draws], K)
    order = np.random.default_rng(2).permutation(len(draws))
    parts = [worlds.written(PROMPT, EVERY[draws[i]], bin=bins[i]) for i in np.array_split(order, 16)]
    control = quark.init(LM, jax.random.key(0), tokens=K, kind="full")
    control, _ = worlds.trained(
        quark.loss(LM, quark.Objective(kl=0.0, entropy=0.0)),
        control,
        {"params": PARAMS},
        parts * 25,
        trained=r"delta/changes/.*|codes",
    )
    for k, wanted in enumerate(slices(base)):
        at = methods.with_strength(control, k / (K - 1))
        assert worlds.divergence(wanted, worlds.probabilities(LM, PARAMS, PROMPT, NEW, at)) < 0.03
        assert worlds.divergence(wanted, base) > 1  # where it came from


def test_every_class_and_its_feedback_reach_the_base_within_them():
    """With one threshold (negative-aware training) and words about failures before the prompt (LeTI): on each token and
    behind each remark the policy is the base restricted to the samples that have them."""
    base = worlds.probabilities(LM, PARAMS, PROMPT, NEW)
    limit = float(np.quantile(REWARD, 0.6))
    draws = np.random.default_rng(1).choice(len(base), 8192, p=base / base.sum())
    classes = quark.Sorting(thresholds=(limit,)).tokens(REWARD[draws], 2, 0)
    remark = np.where(EVERY[:, 0] < 2, 3, 4)  # the feedback on a failure, a token before the prompt
    heads = np.array([[0, *PROMPT] if good else [remark[i], *PROMPT] for i, good in zip(draws, classes)])
    mask = np.ones(heads.shape, bool)
    mask[classes == 1, 0] = False  # a success has no feedback
    parts = [
        worlds.written(PROMPT, EVERY[draws[i]], bin=classes[i]) | {"tokens": heads[i], "mask": mask[i]}
        for i in np.array_split(np.random.default_rng(2).permutation(len(draws)), 16)
    ]
    control = quark.init(LM, jax.random.key(0), tokens=2, kind="full")
    objective = quark.Objective(kl=0.0, entropy=0.0)
    trained = dict(trained=r"delta/changes/.*|codes")
    control, _ = worlds.trained(quark.loss(LM, objective), control, {"params": PARAMS}, parts * 25, **trained)
    for code, before in ((0, [3]), (0, [4]), (1, [])):
        good = limit <= REWARD
        have = good if code else ~good & (remark == before[0])
        wanted = np.where(have, base, 0) / base[have].sum()
        found = worlds.probabilities(LM, PARAMS, before + PROMPT, NEW, methods.with_strength(control, float(code)))
        assert worlds.divergence(wanted, found) < 0.03
        assert worlds.divergence(wanted, base) > 0.3  # where it came from


def test_classes_by_hand():
    sorting = quark.Sorting(thresholds=(0.2, 0.5))
    assert sorting.tokens(np.array([0.1, 0.2, 0.5, 0.4, 0.9]), 3, 0).tolist() == [0, 1, 2, 1, 2]
    with pytest.raises(InputError, match="none of the 2 samples is in class 1 of the thresholds"):
        sorting.tokens(np.array([0.1, 0.7]), 3, 0)
    for wrong in ((0.5, 0.2), (0.5,), "judge", 0.5):
        with pytest.raises(InputError, match="expected 2 ascending numbers, one fewer than tokens"):
            quark.Sorting(thresholds=wrong).tokens(np.array([0.1, 0.7]), 3, 0)


def test_kept_states_give_the_loss_of_reading_again():
    """The value and its gradient, with a ragged batch behind padded prompts."""
    control = quark.example(LM, jax.random.key(3))
    batch = worlds.written(PROMPT, EVERY[:6], bin=jnp.arange(6) % 3)
    at = np.add.outer(np.arange(6), np.arange(2))
    batch |= {"mask": jnp.asarray(at >= 1), "written": jnp.asarray(at < 6)}
    keys = jax.random.split(jax.random.key(0), 6)
    prompts = worlds.prompts([PROMPT] * 6).replace(mask=batch["mask"])
    logp, states = loop.scored(LM, PARAMS, prompts, batch["completion"], states=True)
    np.testing.assert_array_equal(logp, loop.score(LM, PARAMS, prompts, batch["completion"]))
    # Behind the end of a text there are no states on disk, and none are looked at.
    kept = jnp.where(batch["written"][:, :, None], states, 0.0)
    total = quark.loss(LM, quark.Objective(kl=0.7))

    def mean(control, rows):
        out = total(control, {"params": PARAMS}, rows, keys)
        return out.total / out.weight

    given = [jax.value_and_grad(mean, allow_int=True)(control, rows) for rows in (batch, batch | {"states": kept})]
    (value, slope), (other, other_slope) = given
    assert float(other) == pytest.approx(float(value), rel=1e-6)
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(other_slope)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    shifted = batch | {"states": jnp.roll(kept, 1, axis=0)}
    assert abs(float(mean(control, shifted)) - float(value)) > 1e-4


def test_the_loss_by_hand():
    """One position with logits (0, 0) under the policy and (log 3, 0) under the base; target 0."""
    lm = worlds.Bigram(vocab=2)
    params = worlds.table([[0.75, 0.25], [0.5, 0.5]])
    control = quark.init(lm, jax.random.key(0), tokens=2, kind="full")
    flat = {
        "head/kernel": {"full": worlds.table([[0.5, 0.5], [0.5, 0.5]])["head"]["kernel"] - params["head"]["kernel"]}
    }
    control = control.replace(delta=control.delta.replace(changes=flat))
    batch = worlds.written([0], np.array([[0]]), bin=jnp.array([1]))
    keys = jax.random.split(jax.random.key(0), 1)

    def total(**hp):
        out = quark.loss(lm, quark.Objective(**hp))(control, {"params": params}, batch, keys)
        return float(out.total / out.weight)

    cross, entropy = np.log(2), np.log(2)
    to_base = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    from_base = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert total(kl=0.0, entropy=0.0) == pytest.approx(cross, rel=1e-6)
    assert total(kl=0.3, entropy=0.1) == pytest.approx(cross + 0.3 * from_base - 0.1 * entropy, rel=1e-6)
    other = total(kl=0.3, entropy=0.1, direction="policy_reference")
    assert other == pytest.approx(cross + 0.3 * to_base - 0.1 * entropy, rel=1e-6)


def test_a_row_decodes_on_its_own_token():
    control = quark.example(LM, jax.random.key(3))
    prompts = worlds.prompts([PROMPT] * 3, cond={"bin": jnp.array([0, 2, 1])})
    completion = jnp.asarray(EVERY[:3])
    mixed = loop.score(LM, PARAMS, prompts, completion, control.replace(cond="bin"))
    by_scale = methods.with_strength(control, jnp.array([0.0, 1.0, 0.5]))
    np.testing.assert_allclose(loop.score(LM, PARAMS, prompts, completion, by_scale), mixed, rtol=1e-6)
    for row, k in enumerate((0, 2, 1)):
        alone = loop.score(LM, PARAMS, prompts, completion, methods.with_strength(control, k / 2))
        np.testing.assert_allclose(alone[row], mixed[row], rtol=1e-6)
    assert not np.allclose(mixed[0], loop.score(LM, PARAMS, prompts, completion, control)[0])


def test_unlikelihood_by_hand():
    """Tokens 2 3 2 | 3: the candidates for the last are 2 (once) and not 3, the target: -log(1 - p(2))."""
    tokens, mask = jnp.array([[2, 3, 2, 3]]), jnp.ones((1, 4), bool)
    z = jnp.log(jnp.array([[[0.1, 0.2, 0.4, 0.3]]]))
    value = losses.unlikelihood(z, tokens, losses.earlier_tokens(tokens, mask, 1))
    assert float(value[0, 0]) == pytest.approx(-np.log(0.6), rel=1e-6)


def test_bad_input():
    with pytest.raises(InputError, match="all 8 rewards are 1: there is nothing to sort"):
        calibrate.bins([1.0] * 8, 2)
    with pytest.raises(InputError, match="5 quantile bins were asked for and the pool has 3 samples"):
        calibrate.bins([1.0, 2.0, 3.0], 5)
    with pytest.raises(InputError, match="reward 1 is nan"):
        calibrate.bins([1.0, np.nan, 3.0], 2)
    with pytest.raises(InputError, match="direction is 'both', expected one of"):
        quark.loss(LM, quark.Objective(direction="both"))
    with pytest.raises(InputError, match="1 control codes"):
        quark.init(LM, jax.random.key(0), tokens=1)
    with pytest.raises(InputError, match="kind is 'prompt'"):
        quark.init(LM, jax.random.key(0), kind="prompt")
