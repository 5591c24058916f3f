"""Sparse features: codes and descent by hand, one feature at a level, an autoencoder that learns, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.methods import sparse_steer
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.types import InputError
from tests.data.chats import assistant, user, write_chat_lm

WORLD = worlds.Bigram()
PROMPTS = worlds.prompts([[0, 1, 2]])


def identity(**options):
    """E = W = I, no biases: the code of a state is its positive part."""
    control = sparse_steer.init(WORLD, jax.random.key(0), features=3, site=1, **options)
    return control.replace(code=control.code | {"encode": jnp.eye(3), "decode": 4 * jnp.eye(3)})  # columns are normed


@pytest.mark.parametrize("iterations, share", [(1, 0.1), (5, 0.40951), (10, 0.65132)])
def test_descent_by_hand(iterations, share):
    """At a rate of .1 a code goes this share of the way to μ = (2, 0, 1), on each of three tokens."""
    control = identity(iterations=iterations)
    control = control.replace(goal=jnp.array([[9.0, 9, 9], [2, 0, 1]]))
    h = jnp.array([[[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [2.0, -1.0, 1.0]]])
    wanted = h + share * (control.goal[1][None, None] - jnp.maximum(h, 0))  # −1 has code 0, and so has its goal
    state = control.init(PROMPTS, 4)
    for site in (1, jnp.int32(1)):
        np.testing.assert_allclose(control.hidden(h, site, None, state), wanted, atol=1e-4)
    np.testing.assert_array_equal(control.hidden(h, jnp.int32(2), None, state), h)


def test_a_size_an_offset_and_the_class_of_each_row():
    control = identity(iterations=1, rate=1.0, choice="class")
    code = control.code | {"size": jnp.float32(2), "offset": jnp.array([0.5, 0, 0])}
    control = control.replace(code=code, goal=jnp.array([[0.0, 0, 0], [1, 0, 0]]))
    h = jnp.array([[[3.0, 2.0, 0.0]], [[3.0, 2.0, 0.0]]])
    np.testing.assert_allclose(sparse_steer.encoded(code, h)[0, 0], [1.0, 1.0, 0.0])
    state = control.init(worlds.prompts([[0], [1]], cond={"class": jnp.array([0, 1])}), 2)
    np.testing.assert_allclose(control.hidden(h, 1, None, state)[:, 0], [[1, 0, 0], [3, 0, 0]], atol=1e-6)


def test_one_feature_at_a_level():
    control = sparse_steer.one_feature(identity(), 2, 5.0)
    h = jnp.array([[[1.0, 2.0, 0.0], [0.0, 0.0, 7.0], [2.0, -1.0, 1.0]]])
    found = control.hidden(h, 1, None, control.init(PROMPTS, 4))
    np.testing.assert_allclose(found[0], [[1, 2, 5], [0, 0, 5], [2, -1, 5]], atol=1e-6)
    with pytest.raises(InputError, match="feature is 3, expected from 0 to 2"):
        sparse_steer.one_feature(identity(), 3, 1.0)


def test_an_autoencoder_learns_one_hot_states():
    table = worlds.table([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    control = sparse_steer.init(WORLD, jax.random.key(1), features=8, site=1)
    batch = {
        "tokens": jnp.array([[0, 1], [2, 0]]),
        "mask": jnp.array([[True, True], [True, False]]),
        "ids": jnp.arange(2),
    }
    loss = sparse_steer.loss(WORLD)
    trained = "code/(encode|bias|decode|offset)"
    learned, metrics = worlds.trained(loss, control, {"params": table}, [batch] * 200, rate=3e-2, trained=trained)
    assert float(metrics["error"]) < 0.02 and float(learned.code["size"]) == 1
    assert float(loss(control, {"params": table}, batch, None).weight) == 3  # padding does not count


def test_fit(small):
    root, lm, data = small
    tiny = dict(features=8, site=1, iterations=2, training=dict(steps=3, batch=4, tokens=16))
    control = methods.load(sparse_steer.fit(root, lm=lm, data=data, **tiny), open_lm(lm)[0])
    assert control.goal.shape == (2, 8) and float(control.goal.max()) > 0 and float(control.code["size"]) != 1
    assert float(jnp.abs(control.goal[0] - control.goal[1]).max()) > 0
    for bad in (dict(target=2), dict(iterations=0), dict(site="all")):
        with pytest.raises(InputError, match="expected one site, a class that"):
            sparse_steer.init(worlds.tiny(depth=3), jax.random.key(0), **bad)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """(root, lm, data): conversations of the labels 0 and 2 that end with the same answer."""
    root = tmp_path_factory.mktemp("chats")
    lm = stage(root, sources.load_lm, {"source": str(write_chat_lm(root / "lm", "llama3"))})
    asked = zip(["food", "a b", "good food", "be a"], [0, 2, 0, 2])
    rows = [{"messages": [user(text), assistant("good")], "label": i} for text, i in asked]
    (root / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root, lm, stage(root, sources.load_data, dict(source=f"jsonl:{root / 'chats.jsonl'}", split="all"))


TINY = dict(features=8, site=1, training=dict(steps=2, batch=4, tokens=48))


def test_the_codes_of_conversations_are_those_of_all_their_messages(chats):
    root, lm, data = chats
    control = methods.load(sparse_steer.fit(root, lm=lm, data=data, target=2, **TINY), open_lm(lm)[0])
    assert control.goal.shape == (3, 8) and float(jnp.abs(control.goal[0] - control.goal[2]).max()) > 0


@pytest.mark.parametrize("target", [1, 3])
def test_a_target_without_texts_is_refused(chats, target):
    root, lm, data = chats
    with pytest.raises(InputError, match=rf"target is {target}, but the labels in .* are \[0, 2\]"):
        sparse_steer.fit(root, lm=lm, data=data, target=target, **TINY)


def test_the_widths_of_the_paper_on_paper():
    """`:paper`, with two of its layers: shapes alone, no array is made."""
    lm = Transformer.llama(vocab=256000, width=2304, depth=2, heads=8, kv_heads=4, mlp_width=9216, context=4096)
    out = worlds.written_on_paper(lm, lambda key: sparse_steer.init(lm, key, features=16384, site=1))
    assert out.tokens.shape == (1, 2)
