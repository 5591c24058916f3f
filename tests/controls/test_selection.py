"""Which tokens a control acts on, and what it does there: numbers worked out by hand on three tokens, and the laws of
batches, padding and caches for every selection and every operator."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.control import Chain, columns, enter
from ctg_jax.controls.operators import OPERATORS, Probe, operate
from ctg_jax.controls.selection import END, ROLE, Placed, Positions, asks_roles, positions, roles
from ctg_jax.controls.streams import LastTokens
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.decode import loop, speculate
from ctg_jax.methods import cav, dexperts, latent_steer, lm_steer, steer
from ctg_jax.stages import sampling
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny()
PARAMS = worlds.lively(LM)
ROWS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 3, 10, 1]]
NEW = jnp.array([[5, 3, 7], [3, 1, 2], [1, 2, 5], [8, 9, 3]])


def chosen(value, size, before=0, after=0, cond=None, tokens=None):
    """The selected positions of one row: a prompt of `size` tokens between vectors, and three tokens behind it."""
    p = positions(value)
    prompts = worlds.prompts([[0] * size], cond=cond)
    placed = p.begin(prompts).began(jnp.array([before + size + after]), jnp.array([before]))
    if tokens is not None:
        placed = p.seen(placed, jnp.asarray([tokens]))
    at = jnp.arange(before + size + after + 3)[None]
    mask = p.mask(at, placed)
    return list(range(at.shape[1])) if mask is None else np.flatnonzero(mask[0]).tolist()


@pytest.mark.parametrize(
    "value, alone, behind",  # a prompt of three tokens and three new ones: alone, and behind two vectors
    [
        ("all", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("prompt", [0, 1, 2], [2, 3, 4]),
        ("generated", [3, 4, 5], [5, 6, 7]),
        ("answer", [2, 3, 4, 5], [4, 5, 6, 7]),
        ("first", [0], [2]),
        ("last", [2], [4]),
        (dict(part="prompt", start=-2), [1, 2], [3, 4]),
        (dict(part="prompt", start=1, stop=-1), [1], [3]),
        (dict(part="prompt", start=-5, every=2), [0, 2], [2, 4]),  # no more than the prompt has, as in a slice
        (dict(part="prompt", stop=-4), [], []),
        (dict(start=1, stop=4), [1, 2, 3], [3, 4, 5]),
        (dict(part="generated", stop=1), [3], [5]),
        (dict(part="generated", every=2), [3, 5], [5, 7]),
        (dict(part="answer", start=1, every=2), [3, 5], [5, 7]),
        (dict(part="generated", start=7), [], []),
    ],
)
def test_places_by_hand(value, alone, behind):
    assert chosen(value, 3) == alone and chosen(value, 3, before=2) == behind
    # Two vectors behind the prompt are its end: it is as a prompt of five tokens.
    assert chosen(value, 3, after=2) == chosen(value, 5) and chosen(value, 1, before=2, after=2) == chosen(value, 3, 2)
    p = positions(value)  # each row's own numbers give the same
    row = jnp.array([[("all", "prompt", "generated", "answer").index(p.part), p.start, p.stop, p.every]])
    assert chosen(dict(row="where"), 3, cond={"where": row}) == alone
    assert chosen(dict(row="where"), 3, before=2, cond={"where": row}) == behind


def test_tokens_and_roles_by_hand():
    assert chosen(dict(tokens=(4, 6)), 3, tokens=[4, 5, 6, 6, 1, 4]) == [0, 2, 3, 5]
    assert chosen(dict(part="generated", tokens=(4, 6)), 3, tokens=[4, 5, 6, 6, 1, 4]) == [3, 5]
    spoken = {ROLE: jnp.array([[-1, 1, 1, -1, 2]])}  # wider than the prompt: its three tokens are the last
    assert chosen(dict(roles=("user",)), 3, cond=spoken) == [0]
    assert chosen(dict(roles=("user",)), 3, before=2, cond=spoken) == [2]
    assert chosen(dict(roles=("user",)), 3, before=2, after=2, cond=spoken) == [2]
    assert chosen(dict(roles=("assistant",)), 3, cond=spoken) == [2, 3, 4, 5]  # what is written is the assistant's


def test_places_where_the_first_token_is_hidden_by_hand():
    """Of a prompt of three tokens a stream reads two, at positions 0 and 1."""
    spoken = {ROLE: jnp.array([[1, -1, 2]])}
    for value, wanted in (
        ("prompt", [0, 1]), ("first", [0]), ("last", [1]), (dict(part="prompt", start=-2), [0, 1]),
        (dict(part="prompt", start=1), [1]), ("answer", [1, 2, 3, 4]), (dict(roles=("user",)), []),
        (dict(roles=("assistant",)), [1, 2, 3, 4]),
    ):  # fmt: skip
        assert chosen(value, 3, before=-1, cond=spoken) == wanted, value


@pytest.mark.parametrize(
    "value, words",
    [
        ("middle", "positions is 'middle', expected one of all, prompt, generated, answer, first, last"),
        (dict(window=3), "expected a name or a dictionary with some of part, start"),
        (dict(every=0), "every from 1"),
        (dict(part="generated", start=-1), "a completion has no end to count from"),
        (dict(tokens=(3, -1)), r"positions has the tokens \(3, -1\), expected a list of token ids, from 0"),
        (dict(tokens=5), "positions has the tokens 5, expected a list"),
        (dict(roles=("usr",)), "expected some of system, user, assistant, tool"),
        (dict(row="where", start=2), "beside row, which replaces them"),
    ],
)
def test_bad_selections(value, words):
    with pytest.raises(InputError, match=words):
        positions(value)


@pytest.mark.parametrize(
    "rows, words",
    [([[0, 0, 9, 1.5]], "expected whole numbers"), ([[0, 0, 9]], r"has shape \(1, 3\)"),
     ([[5, 0, 9, 1]], "expected a part from 0 to 3"), ([[2, -1, 9, 1]], "from 0 where the part is 2 or 3")],
)  # fmt: skip
def test_bad_rows(rows, words):
    with pytest.raises(InputError, match=words):
        positions(dict(row="where")).check(worlds.prompts([[1]], cond={"where": jnp.asarray(rows)}))


def test_operators_by_hand():
    """h = (3, 4) has length 5; v = (2, 0); three tokens of which the second has twice the state."""
    h = jnp.array([[[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]]])
    v, one = jnp.array([2.0, 0.0]), jnp.ones((1, 1, 1))
    for operator, wanted in (
        ("ablate", [[0, 4], [0, 8], [0, 1]]),
        ("clamp", [[3, 4], [3, 8], [3, 1]]),  # 1.5 lengths of v
        ("rotate", [[25 / 41**0.5, 20 / 41**0.5], [80 / 128**0.5, 80 / 128**0.5], [2 / 5**0.5, 1 / 5**0.5]]),
    ):
        found = operate(operator, h, v, one, jnp.float32(1.5))
        np.testing.assert_allclose(found[0], wanted, rtol=1e-5)
        np.testing.assert_allclose(operate(operator, h, v, 0 * one, jnp.float32(1.5)), h, rtol=1e-6)
    half = operate("ablate", h, v, 0.5 * one, None)
    np.testing.assert_allclose(half[0], [[1.5, 4], [3, 8], [0, 1]], rtol=1e-6)
    turned = operate("rotate", h, v, 3 * one, None)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(h, axis=-1), rtol=1e-5)
    for operator in OPERATORS[1:]:  # no direction, nothing done; a row its own vector
        np.testing.assert_array_equal(operate(operator, h, 0 * v, one, jnp.float32(1.0)), h)
        both = operate(operator, jnp.concatenate([h, h]), jnp.stack([v, 0 * v]), one, jnp.float32(1.5))
        np.testing.assert_allclose(both[0], operate(operator, h, v, one, jnp.float32(1.5))[0])
        np.testing.assert_allclose(both[1], h[0])


def test_a_gate_by_hand():
    """w·h + b = h₀ − 2: open for the first two of three tokens."""
    h = jnp.array([[[3.0, 4.0], [2.5, 8.0], [2.0, 1.0]]])
    probe = Probe(jnp.array([[0.0, 0.0], [1.0, 0.0]]), jnp.array([0.0, -2.0]))
    assert probe.open(h, 1)[0, :, 0].tolist() == [True, True, False] and not probe.open(h, 0).any()


def test_an_exact_world_under_every_operator():
    """States are one-hots of three tokens; v = e₁ at the site before the unembedding: z = W h'."""
    table = worlds.table([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    world, w = worlds.Bigram(), np.asarray(table["head"]["kernel"], np.float64)
    vector = jnp.zeros((3, 3)).at[2, 1].set(1.0)
    after = {
        "add": [[1, 1, 0], [0, 2, 0], [0, 1, 1]], "ablate": [[1, 0, 0], [0, 0, 0], [0, 0, 1]],
        "rotate": [[0.5**0.5, 0.5**0.5, 0], [0, 1, 0], [0, 0.5**0.5, 0.5**0.5]],
        "clamp": [[1, 2, 0], [0, 2, 0], [0, 2, 1]],
    }  # fmt: skip
    for operator, states in after.items():
        control = steer.Steer(vector, jnp.ones(3), jnp.float32(1), jnp.float32(2.0), operator=operator)
        found = loop.forward(world, table, worlds.prompts([[0], [1], [2]]), jnp.zeros((3, 1), jnp.int32), control)
        wanted = np.asarray(states) @ w.T
        np.testing.assert_allclose(jax.nn.log_softmax(found[:, 0]), jax.nn.log_softmax(wanted), atol=1e-5)


def edits():
    key = jax.random.key(7)
    base = steer.example(LM, key)
    probe = Probe(jax.random.normal(jax.random.key(1), base.vector.shape), jnp.zeros(LM.depth + 2))
    where = dict(row=Positions(row="where"), roles=Positions(roles=("user",)), tokens=Positions(tokens=(3, 5)))
    where |= dict(window=Positions("prompt", -2), every=Positions("generated", every=2), answer=Positions("answer"))
    found = {name: base.replace(positions=p) for name, p in where.items()}
    found |= {name: base.replace(operator=name, target=jnp.float32(2)) for name in OPERATORS[1:]}
    found["probe"] = base.replace(probe=probe)
    found["cav"] = cav.example(LM, key).replace(positions=Positions("prompt", every=2))
    found["lm_steer"] = lm_steer.example(LM, key).replace(positions=Positions(tokens=(1, 2, 3, 5, 8)))
    latent = latent_steer.example(LM, key)
    found["latent_steer"] = latent.replace(positions=Positions("answer", every=2))
    return found


COND = {"where": jnp.array([[1, 0, END, 1], [2, 1, 9, 2], [0, 0, END, 1], [3, 0, END, 1]]),
        ROLE: jnp.array([[-1, 1, 1, -1, 1], [1, 1, 2, 2, 1], [0, 0, 0, 0, 1], [1, -1, 1, 1, 0]])}  # fmt: skip


def together():
    """Six of them in one chain, so that the default run compiles few programs."""
    some = ("row", "roles", "tokens", "every", "rotate", "clamp")
    return Chain(tuple(jax.tree.map(lambda x: 0.5 * x, edits()[name]) for name in some))


@pytest.mark.parametrize("name", ["together", *(pytest.param(n, marks=pytest.mark.slow) for n in edits())])
def test_a_row_is_the_same_alone_padded_and_cached(name):
    """batch = single = padded = cached; and it acts behind a soft prompt where it acts alone."""
    control = together() if name == "together" else edits()[name]
    batch = worlds.prompts(ROWS, cond=COND)
    z = loop.forward(LM, PARAMS, batch, NEW, control)
    assert float(jnp.max(jnp.abs(z - loop.forward(LM, PARAMS, batch, NEW)))) > 1e-3
    wide = worlds.prompts(ROWS, length=7, cond=COND)
    np.testing.assert_allclose(loop.forward(LM, PARAMS, wide, NEW, control), z, rtol=1e-4, atol=1e-4)
    one = jax.tree.map(lambda x: x[3:], batch)
    np.testing.assert_allclose(loop.forward(LM, PARAMS, one, NEW[3:], control)[0], z[3], rtol=1e-4, atol=1e-4)
    samples = loop.generate(LM, PARAMS, batch, control, Sampling(max_new=3))
    np.testing.assert_allclose(loop.score(LM, PARAMS, batch, samples.tokens, control), samples.logp, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokens", "row"])
def test_tokens_are_told_behind_vectors_in_streams_and_in_speculation(name):
    control = edits()[name]
    batch = worlds.prompts(ROWS, cond=COND)
    soft = SoftPrompt(soft_prompt(jax.random.key(1), 2, LM.width))
    for after in (False, True):
        chain = Chain((soft.replace(after=after), control))
        samples = loop.generate(LM, PARAMS, batch, chain, Sampling(max_new=3))
        np.testing.assert_allclose(loop.score(LM, PARAMS, batch, samples.tokens, chain), samples.logp, atol=1e-4)
    told = dexperts.experts(dexperts.Stream(control=Chain((soft, control)), lm=LM), alpha=1.0)
    wanted = loop.forward(LM, PARAMS, batch, NEW, Chain((soft, control)))
    np.testing.assert_allclose(loop.forward(LM, PARAMS, batch, NEW, told), wanted, rtol=1e-4, atol=1e-4)
    spec = speculate.Speculative(steer.Control(), control, k=2)
    from ctg_jax.decode import strategies

    quick = strategies.run(LM, PARAMS, batch, spec, Sampling(max_new=3))
    np.testing.assert_allclose(loop.score(LM, PARAMS, batch, quick.tokens, control), quick.logp, atol=1e-4)


def test_where_the_prompt_begins():
    """Between three vectors and two, and where the first tokens of the prompt are hidden from a stream."""
    control, batch = steer.example(LM, jax.random.key(7)), worlds.prompts([[1, 2], [3, 4, 5]])
    x = LM.embed(PARAMS, batch.tokens)

    def placed(*others):
        chain = Chain((*others, control))
        found = enter(chain, x, batch.mask, chain.init(batch, 8))[2][-1][-1]
        return found.size.tolist(), found.first.tolist(), found.end.tolist()

    before, after = (SoftPrompt(soft_prompt(jax.random.key(1), n, LM.width), after=n == 2) for n in (3, 2))
    assert placed() == ([2, 3], [0, 0], [2, 3])
    assert placed(before, after) == placed(after, before) == ([2, 3], [3, 3], [7, 8])
    assert placed(LastTokens(2)) == ([2, 3], [0, -1], [2, 2])
    assert placed(LastTokens(1), before) == ([2, 3], [2, 1], [4, 4])


def test_columns_of_tokens_behind_and_before_vectors():
    """Two vectors before or behind the prompt, and none of them is a token."""
    tokens = jnp.array([[0, 1, 2], [3, 4, 5]])
    prompts = worlds.prompts([[1, 2], [3, 4, 5]])
    x = LM.embed(PARAMS, tokens)
    before, behind = [[-1, -1, 0, 1, 2], [-1, -1, 3, 4, 5]], [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1]]
    for after, wanted in ((False, before), (True, behind)):
        soft = SoftPrompt(soft_prompt(jax.random.key(1), 2, LM.width), after=after)
        chain = Chain((edits()["tokens"], soft))
        assert columns(chain, tokens, x, chain.init(prompts, 5)).tolist() == wanted
    assert columns(edits()["tokens"], tokens, x, ()) is tokens


def test_an_operator_without_the_base_is_refused_by_name():
    with pytest.raises(InputError, match="operator is 'scale', expected one of add, ablate, rotate, clamp"):
        steer.init(LM, jax.random.key(0), operator="scale")
    assert Placed.behind(jnp.array([3])).end.tolist() == [3]


def test_roles_are_asked_for_by_a_control_and_by_what_it_holds():
    user = {"positions": {"roles": ["user"]}}
    assert asks_roles(user) and asks_roles({"least": 0.5, "steer": user})
    assert not any(map(asks_roles, (None, {}, {"positions": "answer"}, {"steer": {"positions": {"tokens": [3]}}})))


def test_roles_of_a_conversation(tmp_path, monkeypatch):
    from ctg_jax.data import load_tokenizer
    from tests.data.chats import write_chat_lm

    tokenizer = load_tokenizer(write_chat_lm(tmp_path / "lm", "qwen", context=192))
    talk = [{"role": "user", "content": "good food"}, {"role": "assistant", "content": "be brief"},
            {"role": "user", "content": "a b"}]  # fmt: skip
    found = roles(tokenizer, ["plain", talk])
    conversation = tokenizer.chat.prompt(talk)
    assert found.shape == (2, len(conversation.ids)) and (found[0] == -1).all()
    np.testing.assert_array_equal(found[1] == 1, conversation.role("user"))
    # Where the KL of an answer is measured, the prompt is what comes before the answer.
    monkeypatch.setattr(sampling, "opened", lambda lm: (None, None, tokenizer))
    artifact = SimpleNamespace(spec={"method": "steer", "init": {"positions": {"roles": ["user"]}}})
    answered = [*talk, {"role": "assistant", "content": "good"}]
    np.testing.assert_array_equal(sampling.conditions([artifact], None, ["plain", answered])[ROLE], found)
    ids = tokenizer.chat.encode(answered)
    assert ids.ids[: ids.answer.start] == conversation.ids
    np.testing.assert_array_equal(found[1] == 2, conversation.role("assistant"))
