"""Losses against numbers worked out by hand on a three-token example, and as gradients of what they say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ctg_jax import rng
from ctg_jax.control import IDENTITY, Control
from ctg_jax.learn import losses
from ctg_jax.methods import finetune
from ctg_jax.models.decoder import Transformer

LM = Transformer.gpt2(vocab=11, width=8, depth=2, heads=2, context=16)
PARAMS = jax.jit(LM.init)(jax.random.key(1))
LOG2, LOG3, LOG4 = math.log(2), math.log(3), math.log(4)
# Three tokens, a vocabulary of three: probabilities (1/2, 1/4, 1/4), (1/3, 1/3, 1/3), (1/4, 1/4, 1/2), shifted by 5.
Z = jnp.array([[-LOG2, -LOG4, -LOG4], [0.0, 0.0, 0.0], [5.0 - LOG4, 5.0 - LOG4, 5.0 - LOG2]])


@struct.dataclass
class Push(Control):
    bias: jax.Array

    def logits(self, z, h, tokens, mask, state):
        return z + self.bias[None, None, :], state


def text(batch=3, length=6):
    tokens = np.random.default_rng(0).integers(0, LM.vocab, (batch, length), np.int32)
    mask = np.arange(length)[None, :] < np.array([6, 4, 2])[:batch, None]
    return {"tokens": tokens, "mask": mask, "ids": np.arange(batch, dtype=np.int32)}


def keys(batch):
    return rng.per_example(jax.random.key(0), batch["ids"])


def test_next_token_by_hand():
    got = losses.next_token(Z, jnp.array([0, 2, 1]))
    np.testing.assert_allclose(got, [LOG2, LOG3, LOG4], rtol=1e-6)
    assert got.dtype == jnp.float32


def test_masked_total_by_hand():
    values = losses.next_token(Z, jnp.array([0, 2, 1]))
    total, weight = losses.masked_sum(values, jnp.array([True, False, True]))
    np.testing.assert_allclose((total, weight), (LOG2 + LOG4, 2.0), rtol=1e-6)
    total, _ = losses.masked_sum(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
    assert total == 1.0


def test_reweighted_by_hand():
    """p = .5: weight 1, loss log 2, slope -4.178 in p, as the weight is differentiated; p = .3: 1.588 and 1.912."""

    def of(p, gamma=1.0):
        return losses.reweighted(jnp.log(jnp.stack([p, 1 - p])), jnp.array(0), gamma)

    assert np.isclose(of(jnp.float32(0.5)), LOG2, rtol=1e-5) and np.isclose(of(jnp.float32(0.3)), 1.912, atol=1e-3)
    slope = jax.grad(lambda p: of(p))(jnp.float32(0.5))
    np.testing.assert_allclose(slope, -4.178, atol=2e-3)
    p = jnp.linspace(0.01, 0.99, 981)  # of a token that follows in 7 of 10 cases
    for gamma, wanted in ((0.0, 0.7), (1.0, 0.6046), (2.0, 0.5625)):
        one = jax.vmap(of, in_axes=(0, None))
        value = 0.7 * one(p, gamma) + 0.3 * one(1 - p, gamma)
        assert abs(float(p[jnp.argmin(value)]) - wanted) < 2e-3


def test_earth_mover_by_hand():
    """p = (.5, .3, .2), target 0: 1 - p with orthogonal rows; .26 where cos(0, 1) = .8. The gradient of the mix."""
    z, target = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.array(0)
    np.testing.assert_allclose(losses.earth_mover(z, target, jnp.eye(3)), 0.5, rtol=1e-5)
    near = losses.unit_rows(jnp.array([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 3]]))
    np.testing.assert_allclose(losses.earth_mover(z, target, near), 0.26, rtol=1e-5)
    both = lambda z: finetune.Objective(kind="earth_mover").token(z, target, {"table": jnp.eye(3)})  # noqa: E731
    value, slope = jax.value_and_grad(both)(z)
    np.testing.assert_allclose(value, LOG2, rtol=1e-5)
    np.testing.assert_allclose(slope, [-0.4233, 0.2540, 0.1693], atol=1e-4)
    light = finetune.Objective(kind="earth_mover", light=True).token(z, target, {"table": jnp.eye(3)})
    np.testing.assert_allclose(light, 2 * 0.5, rtol=1e-5)


def test_the_mixed_optimum_prefers_similar_words():
    """Targets (.4, .35, .25), cos(0, 1) = .8: it rests at (.494, .428, .079), not at the data."""
    table = losses.unit_rows(jnp.array([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1]]))
    objective, share = finetune.Objective(kind="earth_mover"), jnp.array([0.4, 0.35, 0.25])

    def mean(z):
        each = objective.token(jnp.tile(z[None], (3, 1)), jnp.arange(3), {"table": table})
        return jnp.sum(share * each)

    step = jax.jit(lambda z: z - 0.5 * jax.grad(mean)(z))
    z = jnp.zeros(3)
    for _ in range(600):
        z = step(z)
    np.testing.assert_allclose(jax.nn.softmax(z), [0.494, 0.428, 0.079], atol=2e-3)


def test_kl_by_hand_in_both_directions():
    # p = (1/2, 1/4, 1/4), u uniform: KL(p‖u) = log 3 - H(p), H(p) = 1.5 log 2; KL(u‖p) = -log 3 + (5/3) log 2.
    np.testing.assert_allclose(losses.kl(Z[0], Z[1]), LOG3 - 1.5 * LOG2, rtol=1e-5)
    np.testing.assert_allclose(losses.kl(Z[1], Z[0]), 5 / 3 * LOG2 - LOG3, rtol=1e-5)
    np.testing.assert_allclose(losses.kl(Z, Z), [0, 0, 0], atol=1e-7)


def test_kl_of_a_truncated_distribution_is_finite():
    p = jnp.array([0.0, -jnp.inf, 0.0])
    np.testing.assert_allclose(losses.kl(p, jnp.zeros(3)), LOG3 - LOG2, rtol=1e-6)
    np.testing.assert_allclose(losses.entropy(p), LOG2, rtol=1e-6)


def test_entropy_and_z_loss_by_hand():
    np.testing.assert_allclose(losses.entropy(Z), [1.5 * LOG2, LOG3, 1.5 * LOG2], rtol=1e-5)
    np.testing.assert_allclose(losses.z_loss(Z), [0.0, LOG3**2, 25.0], rtol=1e-5, atol=1e-6)


def test_lm_loss_counts_only_real_tokens_after_the_first():
    params, batch = PARAMS, text()
    s = losses.lm_loss(LM)(params, None, batch, keys(batch))
    assert s.weight == 5 + 3 + 1
    by_row = 0.0
    for i, length in enumerate((6, 4, 2)):  # each row alone, without padding
        row = jnp.asarray(batch["tokens"][i : i + 1, :length])
        out = jax.jit(lambda r: LM.apply(params, LM.embed(params, r), jnp.ones(r.shape, bool)))(row)
        logp = jax.nn.log_softmax(out.logits[0, :-1])
        by_row -= sum(logp[t, row[0, t + 1]] for t in range(length - 1))
    np.testing.assert_allclose(s.total, by_row, rtol=1e-5)


def test_loss_mask_narrows_to_the_completion():
    params, batch = PARAMS, text()
    batch["loss_mask"] = np.arange(6)[None, :] >= np.array([4, 3, 9])[:, None]
    assert losses.lm_loss(LM)(params, None, batch, keys(batch)).weight == 2 + 1 + 0


def test_control_loss_of_the_identity_is_the_lm_loss():
    params, batch = PARAMS, text()
    a = losses.lm_loss(LM)(params, None, batch, keys(batch))
    b = losses.control_loss(LM)(IDENTITY, {"params": params}, batch, keys(batch))
    np.testing.assert_allclose((a.total, a.weight), (b.total, b.weight), rtol=1e-6)


def test_control_loss_adds_kl_and_its_gradient_reaches_only_the_control():
    params, batch = PARAMS, text()
    control = Push(jnp.linspace(-1, 1, LM.vocab))
    plain = losses.control_loss(LM)(control, {"params": params}, batch, keys(batch))
    loss = losses.control_loss(LM, kl_weight=0.5)
    s = loss(control, {"params": params}, batch, keys(batch))
    far, weight = s.metrics["kl"]
    assert far > 0.1 and weight == plain.weight
    np.testing.assert_allclose(s.total, plain.total + 0.5 * far, rtol=1e-6)
    grads = jax.grad(lambda c: loss(c, {"params": params}, batch, keys(batch)).total)(control)
    assert jnp.linalg.norm(grads.bias) > 0


def test_z_loss_weight_keeps_cross_entropy_as_a_metric():
    params, batch = PARAMS, text()
    plain = losses.lm_loss(LM)(params, None, batch, keys(batch))
    s = losses.lm_loss(LM, z=0.1)(params, None, batch, keys(batch))
    np.testing.assert_allclose(s.metrics["cross_entropy"][0], plain.total, rtol=1e-6)
    assert s.total > plain.total


def test_loss_runs_in_bfloat16_with_remat_and_sums_in_float32():
    lm = Transformer.gpt2(vocab=11, width=8, depth=2, heads=2, context=16, dtype="bfloat16", remat=True)
    params, batch = PARAMS, text()
    (total, s), grads = jax.jit(
        jax.value_and_grad(lambda p: ((s := losses.lm_loss(lm)(p, None, batch, keys(batch))).total, s), has_aux=True)
    )(params)
    assert total.dtype == jnp.float32 and s.weight.dtype == jnp.float32
    full = losses.lm_loss(LM)(params, None, batch, keys(batch)).total
    np.testing.assert_allclose(total, full, rtol=2e-2)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
