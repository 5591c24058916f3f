"""The networks of diffusion: shapes, time, padding, rows, and that the score network learns a known one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax import rng
from ctg_jax.models import diffusion
from ctg_jax.models.denoiser import Denoiser, Trunk
from ctg_jax.models.latent_net import LatentNet
from ctg_jax.types import InputError

TRUNK = Trunk(width=16, depth=3, heads=2, positions=12)


@pytest.fixture(scope="module")
def scored():
    net = LatentNet(TRUNK, latent=6, out=6, context=6, pseudo_tokens=4, spread=4)
    params = jax.jit(net.init)(jax.random.key(0))
    # At first time says nothing; here it does.
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params)
    return net, params


def vectors(n, width=6, seed=2):
    return jax.random.normal(jax.random.key(seed), (n, width))


def test_reads_latent_context_and_time(scored):
    net, params = scored
    run = jax.jit(net.apply)
    z, context, gamma = vectors(4), vectors(4, seed=3), jnp.linspace(-3, 3, 4)
    y = run(params, z, gamma, context)
    assert y.shape == (4, 6) and y.dtype == jnp.float32
    for other in (
        run(params, z + 1, gamma, context),
        run(params, z, gamma + 2, context),
        run(params, z, gamma, context + 1),
    ):
        assert np.abs(other - y).max() > 1e-3
    some = run(params, z, gamma, context, jnp.asarray([True, False, True, False]))
    none = run(params, z, gamma)
    np.testing.assert_allclose(some[::2], y[::2], atol=1e-6)
    np.testing.assert_allclose(some[1::2], none[1::2], atol=1e-6)
    np.testing.assert_allclose(run(params, z[:1], gamma[:1], context[:1]), y[:1], atol=1e-6)


def test_writes_a_soft_prompt():
    net = LatentNet(TRUNK, latent=6, out=10, pseudo_tokens=4, spread=4, prompt=3)
    params = jax.jit(net.init)(jax.random.key(0))
    assert jax.jit(net.apply)(params, vectors(2), jnp.zeros(2)).shape == (2, 3, 10)
    assert "null" not in params


@pytest.mark.parametrize("depth", [2, 3, 4, 7])
def test_the_last_block_can_read_the_input_of_the_network(depth):
    """Where the last skip hands on nothing but what it skipped, the network is its last block on its own input."""
    deep, flat = (Denoiser(Trunk(**(vars(TRUNK) | {"depth": d, "skips": d > 1}))) for d in (depth, 1))
    x, gamma = jax.random.normal(jax.random.key(0), (2, 5, 16)), jnp.asarray([-1.0, 1.0])
    params = deep.init(jax.random.key(1), x, gamma)["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)
    last = f"skip_{depth - 1}"
    assert [name for name in params if name.startswith("skip")] and params[last]["kernel"].shape == (16, 32)
    only_skipped = jnp.concatenate([jnp.zeros((16, 16)), jnp.eye(16)], axis=1)
    params = params | {last: {"kernel": only_skipped, "bias": jnp.zeros(16)}}
    kept = {name: p for name, p in params.items() if not name.startswith(("skip", "block"))}
    alone = kept | {"block_0": params[f"block_{depth - 1}"]}
    found, expected = deep.apply({"params": params}, x, gamma), flat.apply({"params": alone}, x, gamma)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_context_joined_on_features_and_pseudo_tokens_as_soft_tokens():
    """The shapes of the authors: half of the width for each vector, and no positions for the soft tokens."""
    sizes = dict(latent=6, out=6, context=6, pseudo_tokens=4, spread=4, context_spread=2)
    net = LatentNet(Trunk(**(vars(TRUNK) | {"positions": 4, "time_width": 8})), join="features", **sizes)
    params = jax.jit(net.init)(jax.random.key(0))
    assert params["latent_in"]["kernel"].shape == (8, 6) and params["context_in"]["kernel"].shape == (8, 3)
    assert params["denoiser"]["block_0"]["modulation"]["kernel"].shape == (64, 8)
    z, context = vectors(2), vectors(2, seed=3)
    run = jax.jit(net.apply)
    y = run(params, z, jnp.zeros(2), context)
    assert np.abs(run(params, z, jnp.zeros(2), context + 1) - y).max() > 1e-3
    soft = LatentNet(Trunk(**(vars(TRUNK) | {"skips": False})), 6, 10, pseudo_tokens=3, spread=4, prompt=3, slots=False)
    params = jax.jit(soft.init)(jax.random.key(0))
    assert jax.jit(soft.apply)(params, z, jnp.zeros(2)).shape == (2, 3, 10)
    assert "prompt" not in params and not [name for name in params["denoiser"] if name.startswith("skip")]


def test_padding_is_not_read():
    module = Denoiser(TRUNK)
    x, real = jax.random.normal(jax.random.key(0), (1, 5, 16)), jnp.asarray([[True, True, True, False, False]])
    allowed = jnp.broadcast_to(real[:, None], (1, 5, 5))
    params = jax.jit(module.init)(jax.random.key(1), x, jnp.zeros(1), allowed)
    run = jax.jit(module.apply)
    y = run(params, x, jnp.zeros(1), allowed)
    other = run(params, x.at[:, 3:].add(1.0), jnp.zeros(1), allowed)
    np.testing.assert_allclose(other[:, :3], y[:, :3], atol=1e-6)
    assert np.abs(other[:, 3:] - y[:, 3:]).max() > 1e-3


def test_bfloat16_is_close():
    net = LatentNet(TRUNK, latent=6, out=6, pseudo_tokens=4, spread=4)
    params, z = jax.jit(net.init)(jax.random.key(0)), vectors(4)
    half = LatentNet(Trunk(**(vars(TRUNK) | {"dtype": "bfloat16"})), latent=6, out=6, pseudo_tokens=4, spread=4)
    found, exact = (jax.jit(n.apply)(params, z, jnp.zeros(4)) for n in (half, net))
    np.testing.assert_allclose(found, exact, atol=0.02)


def test_learns_the_score_of_a_normal():
    """x ~ N(2, 0.25 I): after a few hundred steps v is near its expectation."""
    import optax

    net = LatentNet(Trunk(width=16, depth=2, heads=2, positions=2), latent=2, out=2, pseudo_tokens=2, spread=4)
    params = jax.jit(net.init)(jax.random.key(0))
    tx = optax.adam(5e-3)

    def batch(key, n=64):
        a, b, c = jax.random.split(key, 3)
        x, eps = 2 + 0.5 * jax.random.normal(a, (n, 2)), jax.random.normal(b, (n, 2))
        return x, eps, jax.random.uniform(c, (n,), minval=-4.0, maxval=4.0)

    def loss(params, key):
        x, eps, gamma = batch(key)
        z = diffusion.noised(x, gamma, eps)
        return jnp.mean((net.apply(params, z, gamma) - diffusion.target("v", x, gamma, eps)) ** 2)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(1), 400))[0][0]

    params = train(params)
    x, eps, gamma = batch(jax.random.key(2), 512)
    z = diffusion.noised(x, gamma, eps)
    found = diffusion.clean("v", jax.jit(net.apply)(params, z, gamma), z, gamma)
    alpha, sigma = (a[:, None] for a in diffusion.alpha_sigma(gamma))
    exact = 2 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (z - alpha * 2)
    assert float(jnp.mean((found - exact) ** 2)) < 0.02 * float(jnp.mean(exact**2))


def test_bad_sizes_are_one_sentence():
    with pytest.raises(InputError, match="heads is 5, expected a divisor"):
        Trunk(width=16, heads=5)
    with pytest.raises(InputError, match="latent is 7"):
        LatentNet(TRUNK, latent=7, out=7, pseudo_tokens=4, spread=2)
    with pytest.raises(InputError, match="join is 'sum', expected one of sequence, features"):
        LatentNet(TRUNK, latent=8, out=8, pseudo_tokens=4, join="sum")
    with pytest.raises(InputError, match="length is 3 without slots"):
        LatentNet(TRUNK, latent=8, out=8, pseudo_tokens=4, prompt=3, slots=False)
    net = LatentNet(TRUNK, latent=8, out=8, pseudo_tokens=16, spread=2)
    with pytest.raises(InputError, match="16 positions, expected at most 12"):
        net.init(jax.random.key(0))


def test_rows_have_their_own_noise():
    from ctg_jax.models import samplers

    keys = rng.per_example(jax.random.key(0), jnp.arange(3))
    np.testing.assert_array_equal(samplers.noise(keys, (2,))[1:2], samplers.noise(keys[1:2], (2,)))
