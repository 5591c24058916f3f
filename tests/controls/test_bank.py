"""Banks: every row of a batch under its own control, in one program; each row is what it is alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.control import Chain, edit_logits, with_strength
from ctg_jax.controls import constraints
from ctg_jax.controls.bank import bank
from ctg_jax.controls.delta import row_delta
from ctg_jax.controls.truncate import Temperature, TopP
from ctg_jax.controls.vectors import SoftPrompt, soft_prompt
from ctg_jax.decode import loop
from ctg_jax.methods import cast, cav, dexperts, finetune, latent_steer, lm_steer, steer
from ctg_jax.types import InputError, Sampling

LM = worlds.tiny(depth=1)
PARAMS = worlds.lively(LM)
ROWS = [[1 + (3 * i + j) % 10 for j in range(1 + i % 4)] for i in range(16)]
KINDS = {
    "steer": steer.example, "cav": cav.example, "lm_steer": lm_steer.example, "latent_steer": latent_steer.example,
    "temperature": lambda lm, key: Temperature(0.5 + jax.random.uniform(key)), "lora": finetune.example,
}  # fmt: skip
NEW = jnp.asarray([[1 + (i + j) % 10 for j in range(3)] for i in range(16)])


def sixteen():
    """(chain of six banks, the control of each row, prompts): row i has control i // 6 of kind i % 6."""
    names, parts, alone, cond = list(KINDS), [], [None] * 16, {}
    for k, name in enumerate(names):
        mine = [i for i in range(16) if i % 6 == k]
        own = [KINDS[name](LM, jax.random.key(10 * k + n)) for n in range(len(mine))]
        own = [c if name == "temperature" else with_strength(c, 0.5 + 0.3 * n) for n, c in enumerate(own)]
        nothing = Temperature(jnp.float32(1)) if name == "temperature" else with_strength(own[0], 0.0)
        make = row_delta if name == "lora" else bank
        parts.append(make([nothing, *own], name))
        cond[name] = jnp.zeros(16, jnp.int32).at[jnp.asarray(mine)].set(1 + jnp.arange(len(mine)))
        for n, i in enumerate(mine):
            alone[i] = own[n]
    return Chain(tuple(parts)), alone, worlds.prompts(ROWS, cond=cond)


def test_sixteen_rows_under_sixteen_controls_of_six_kinds():
    """batch = single = padded = cached."""
    chain, alone, batch = sixteen()
    together = loop.forward(LM, PARAMS, batch, NEW, chain)
    for i in range(16):
        one = worlds.prompts([ROWS[i]], length=4)
        found = loop.forward(LM, PARAMS, one, NEW[i : i + 1], alone[i])
        np.testing.assert_allclose(together[i], found[0], rtol=1e-4, atol=2e-4)
    base = loop.forward(LM, PARAMS, batch, NEW)
    assert float(jnp.min(jnp.max(jnp.abs(together - base), axis=(1, 2)))) > 1e-3  # each of them does something
    wide = worlds.prompts(ROWS, length=6, cond=batch.cond)
    np.testing.assert_allclose(loop.forward(LM, PARAMS, wide, NEW, chain), together, rtol=1e-4, atol=2e-4)
    samples = loop.generate(LM, PARAMS, batch, chain, Sampling(max_new=3))
    np.testing.assert_allclose(loop.score(LM, PARAMS, batch, samples.tokens, chain), samples.logp, atol=1e-4)
    before = loop._forward._cache_size()
    other = batch.replace(cond={name: jnp.where(x > 0, 1 + x % 2, 0) for name, x in batch.cond.items()})
    assert not np.allclose(loop.forward(LM, PARAMS, other, NEW, chain), together)
    assert loop._forward._cache_size() == before


def test_low_rank_changes_by_hand():
    """y = x Wᵀ + s (x aᵀ) bᵀ for each row: two entries of rank 1, and two controls of a chain add up."""
    from ctg_jax.models.layers import Dense

    x = jnp.array([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]])
    kernel = jnp.array([[1.0, 0, 0], [0, 1.0, 0]])
    a = jnp.array([[[1.0, 0, 0]], [[0, 0, 1.0]]])  # x aᵀ = 1 and 3
    b = jnp.array([[[1.0], [0.0]], [[0.0], [2.0]]])
    found = Dense(2, LM, False).apply({"params": {"kernel": kernel, "rows": {"a": a, "b": b}}}, x)
    np.testing.assert_allclose(found[:, 0], [[2, 2], [1, 8]])


@pytest.mark.slow
def test_two_low_rank_banks_of_a_chain_are_both_merged():
    deltas = [finetune.example(LM, jax.random.key(i)) for i in range(4)]
    batch = worlds.prompts(ROWS[:2], cond={"x": jnp.array([0, 1]), "y": jnp.array([1, 0])})
    chain = Chain((row_delta(deltas[:2], "x"), row_delta(deltas[2:], "y")))
    found = loop.forward(LM, PARAMS, batch, NEW[:2], chain)
    for i, pair in enumerate(((0, 3), (1, 2))):
        one = Chain(tuple(deltas[j] for j in pair))
        wanted = loop.forward(LM, PARAMS, worlds.prompts([ROWS[i]]), NEW[i : i + 1], one)
        np.testing.assert_allclose(found[i], wanted[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_banks_of_prompts_and_of_prefixes():
    soft = [SoftPrompt(soft_prompt(jax.random.key(i), 2, LM.width, deviation=1.0)) for i in range(2)]
    memory = latent_steer.init(LM, jax.random.key(0), site="memory")
    kept = [memory.replace(z=jax.random.normal(jax.random.key(i), memory.z.shape)) for i in range(2)]
    for entries in (soft, kept):
        batch = worlds.prompts(ROWS[:4], cond={"entry": jnp.array([0, 1, 1, 0])})
        found = loop.forward(LM, PARAMS, batch, NEW[:4], bank(entries))
        for i in range(4):
            one = worlds.prompts([ROWS[i]], length=4)
            wanted = loop.forward(LM, PARAMS, one, NEW[i : i + 1], entries[[0, 1, 1, 0][i]])
            np.testing.assert_allclose(found[i], wanted[0], rtol=1e-4, atol=2e-4)


def test_the_parts_of_a_chain_keep_the_ratios_of_their_strengths():
    """0.1 and 0.2 as they are; in the second row both at half of it, and without a strength nothing is set."""
    parts = (0.1 * steer.example(LM, jax.random.key(0)), Temperature(jnp.float32(2)))
    chain = Chain((*parts, 0.2 * lm_steer.example(LM, jax.random.key(1))))
    control = bank([chain]).replace(scale=jnp.array([1.0, 0.5]))
    rows = control.init(worlds.prompts(ROWS[:2], cond={"entry": jnp.zeros(2, jnp.int32)}), 5)[0].parts
    np.testing.assert_allclose([rows[0].scale, rows[2].scale], [[0.1, 0.05], [0.2, 0.1]])
    np.testing.assert_allclose(jax.tree.leaves(rows[1])[0], [2, 2])


def test_a_bank_of_filters_is_refused_in_front_of_a_rule_that_must_hold():
    ban = constraints.Ban(jnp.asarray(constraints.marks([1], LM.vocab)))
    constraints.check(Chain((ban, bank([TopP(jnp.float32(0.9))] * 2))), LM.vocab, 3)
    with pytest.raises(InputError, match="Ban comes after Bank"):
        constraints.check(Chain((bank([TopP(jnp.float32(0.9))] * 2), ban)), LM.vocab, 3)


def test_bad_banks():
    one = steer.example(LM, jax.random.key(0))
    batch = worlds.prompts(ROWS[:2], cond={"entry": jnp.array([0, 2])})
    with pytest.raises(InputError, match="is 2 in row 1, but the control has 2: expected a control from 0 to 1"):
        bank([one, one]).check(batch)
    with pytest.raises(InputError, match="is 2 in row 1, but the control has 2"):
        row_delta([finetune.example(LM, jax.random.key(i)) for i in range(2)]).check(batch)
    for entries, words in (
        ([], "was given no controls"),
        ([one, one.replace(operator="rotate")], "control 2 of the bank is another kind, or has other settings"),
        ([one, cav.example(LM, jax.random.key(0))], "control 2 of the bank is another kind"),
        ([finetune.example(LM, jax.random.key(0))], "^Delta changes weights or reads"),
        ([row_delta([finetune.example(LM, jax.random.key(0))])], "^RowDelta changes weights or reads"),
        ([dexperts.example(LM, jax.random.key(0))], "^Experts changes weights or reads"),
        ([cast.example(LM, jax.random.key(0))], "^Cast changes weights or reads"),
    ):
        with pytest.raises(InputError, match=words):
            bank(entries)
    assert bank([TopP(jnp.float32(0.9))] * 3).count == 3
    with pytest.raises(InputError, match="expected LoRA of one shape"):
        row_delta([finetune.init(LM, jax.random.key(0), rank=r) for r in (1, 2)])
    nothing = loop.forward(LM, PARAMS, batch, NEW[:2], 0.0 * bank([one, one, one]))
    np.testing.assert_array_equal(nothing, loop.forward(LM, PARAMS, batch, NEW[:2]))


def test_a_bank_of_states_leaves_the_logits_alone():
    """No operation of a decode step passes over the vocabulary for it."""
    control = bank([steer.example(LM, jax.random.key(i)) for i in range(2)])
    z, h = jnp.zeros((2, 1, LM.vocab)), jnp.zeros((2, 1, LM.width))
    tokens, mask = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), bool)

    def edited(control, state, z):
        return edit_logits(control, z, h, tokens, mask, state)[0]

    batch = worlds.prompts([[1], [2]], cond={"entry": jnp.arange(2)})
    for c in (control, Chain((control, control))):
        assert not jax.make_jaxpr(edited)(c, c.init(batch, 4), z).eqns
