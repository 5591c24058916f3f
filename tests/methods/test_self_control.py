"""Self-Control: the gradient of a judgement, the search by hand, the prefix that learns what it found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.controls.vectors import Shift
from ctg_jax.decode import loop
from ctg_jax.io import json_line
from ctg_jax.methods import self_control
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.run.session import Session
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sources
from ctg_jax.types import InputError, Sampling
from tests.experiments.tiny_lm import write_lm

LM = worlds.tiny()
PARAMS = LM.unstack(worlds.lively(LM))
PROMPTS = worlds.prompts([[1, 2, 3], [4, 5, 6, 7, 8], [9]])
CONTROL = self_control.example(LM, jax.random.key(7)).bind(PARAMS, PARAMS)


@pytest.fixture(scope="module")
def found():
    return jax.jit(lambda control: control.search(PROMPTS))(CONTROL)


def test_the_score_by_hand():
    """z_yes − z_no = 5 and τ = 10: σ(.5) = .62246. A bigram model reads the last token of the question alone."""
    world = worlds.Bigram()
    table = {"layers": {"none": jnp.zeros((1, 1))}, "head": {"kernel": jnp.array([[0, 0, 4.0], [0, 0, 1], [0, 0, -1]])}}
    control = self_control.init(world, jax.random.key(0), length=1, new=2)
    control = control.replace(question=jnp.eye(3)[2:], answer=jnp.array([1.0, 0, -1])).bind(table, table)
    prompts, text = worlds.prompts([[0, 1]]), jnp.array([[1, 1]])
    nothing = jnp.zeros((1, 1, 2, 3))
    np.testing.assert_allclose(control.judge(prompts, text, nothing), [0.62246], atol=1e-5)
    np.testing.assert_array_equal(control.write(prompts, nothing), [[0, 0]])  # ties: the first
    shift, scores = control.search(prompts)
    assert not shift.any() and scores[0, 0] == scores[0, 1]  # nothing that is done to the prompt reaches the answer


def test_a_step_is_the_clipped_gradient_of_the_score(found):
    """Of rows that moved in one turn G is η g or 2 η g, where g by differences of the score agrees with the gradient,
    and each token's is no longer than 1."""
    shift, scores = (np.asarray(x) for x in found)
    rose = scores[:, 1] > scores[:, 0]
    assert rose.any() and (scores[rose, 1] > scores[rose, 0] + self_control.ENOUGH).all()
    assert not shift[~rose].any()
    nothing = jnp.zeros_like(found[0])
    text = CONTROL.write(PROMPTS, nothing)
    slope = np.asarray(jax.grad(lambda d: jnp.sum(CONTROL.judge(PROMPTS, text, d)))(nothing))
    row, site, at = 1, 0, 4
    push = nothing.at[row, site, at].set(jnp.asarray(slope[row, site, at]))
    score = lambda step: float(CONTROL.judge(PROMPTS, text, step * push)[row])  # noqa: E731
    along = (score(1e-1) - score(-1e-1)) / 2e-1
    assert along == pytest.approx(float((slope[row, site, at] ** 2).sum()), rel=0.05)
    clipped = slope / np.maximum(np.linalg.norm(slope, axis=-1, keepdims=True), 1)
    for i in np.flatnonzero(rose):
        factor = (shift[i] * clipped[i]).sum() / (clipped[i] ** 2).sum()
        assert factor == pytest.approx(20, rel=1e-3) or factor == pytest.approx(40, rel=1e-3)
        np.testing.assert_allclose(shift[i], factor * clipped[i], atol=1e-4)
    assert not shift[2, :, 1:].any() and not shift[0, :, 3:].any()  # columns that are no token of the prompt


def test_what_is_written_is_what_was_judged(found):
    """The greedy text under the control is the text of the search, and its score is the one that was reported."""
    out = loop.generate(LM, PARAMS, PROMPTS, CONTROL, Sampling(max_new=3, greedy=True))
    judged = CONTROL.judge(PROMPTS, out.tokens, jnp.zeros_like(found[0]))
    np.testing.assert_allclose(judged, found[1][:, 1], atol=1e-5)


def test_a_text_that_ends_is_judged_without_what_stands_behind_its_end(found):
    """As the shorter text alone is; rows that do not end are judged whole, and an end is written as in decoding."""
    nothing = jnp.zeros_like(found[0])
    whole = np.asarray(CONTROL.write(PROMPTS, nothing))
    end = int(whole[0, 1])
    control = CONTROL.replace(ends=(end,))
    text = np.asarray(control.write(PROMPTS, nothing))
    first = [int(np.argmax(row == end)) if end in row else 3 for row in whole]
    assert first[0] <= 1 and max(first) == 3 and not text[0, first[0] + 1 :].any()
    scores = control.judge(PROMPTS, text, nothing)
    for row, size in enumerate(first):
        alone = CONTROL.replace(new=size).judge(PROMPTS, jnp.asarray(text[:, :size]), nothing)
        np.testing.assert_allclose(scores[row], alone[row], atol=1e-5)
    assert float(jnp.abs(scores - CONTROL.judge(PROMPTS, text, nothing))[0]) > 1e-3


def test_a_shift_moves_tokens_of_the_prompt_alone():
    """Two blocks, three tokens of which one is of the prompt, behind a vector that another control put there or before
    it; and three that are of the prompt, of which the first one is hidden."""
    control = Shift(jnp.arange(1.0, 13).reshape(1, 2, 3, 2), jnp.float32(2.0))
    prompts = worlds.prompts([[1]])
    h, pos = jnp.zeros((1, 3, 2)), jnp.array([[0, 1, 2]])
    for first, wanted in ((1, [[0, 0], [2, 4], [0, 0]]), (0, [[2, 4], [0, 0], [0, 0]])):
        state = control.began(control.init(prompts, 4), jnp.array([2]), jnp.array([first]))
        for site in (1, jnp.int32(1)):
            np.testing.assert_array_equal(control.hidden(h, site, pos, state)[0], wanted)
    state = control.began(control.init(worlds.prompts([[1, 2, 3]]), 4), jnp.array([2]), jnp.array([-1]))
    np.testing.assert_array_equal(control.hidden(h, 1, pos, state)[0], [[6, 8], [10, 12], [0, 0]])
    np.testing.assert_array_equal(control.hidden(h, 2, pos, state)[0, 1], [22, 24])
    for site in (0, 3, jnp.int32(0), jnp.int32(4)):
        np.testing.assert_array_equal(control.hidden(h, site, pos, state), h)


def test_the_loss_is_the_distance_of_states_and_zero_where_they_are_equal():
    """A prefix that nothing attends to, and no shift: 0. With a shift of the last block: its mean square by hand."""
    lm = worlds.tiny(depth=1)
    params = worlds.lively(lm)
    batch = {"tokens": PROMPTS.tokens, "mask": PROMPTS.mask, "shift": jnp.zeros((3, 1, 5, 16))}
    prefix = self_control.init(lm, jax.random.key(0), kind="prefix", length=2)
    quiet = jax.tree.map(jnp.zeros_like, params["layers"]["attn"]["out"])
    silent = {**params, "layers": {**params["layers"], "attn": {**params["layers"]["attn"], "out": quiet}}}
    loss = self_control.loss(lm)
    assert float(loss(prefix, {"params": silent}, batch, PROMPTS.keys).total) == 0
    moved = batch | {"shift": batch["shift"] + 3.0}
    found = loss(prefix, {"params": silent}, moved, PROMPTS.keys)
    assert float(found.total) == pytest.approx(9 * 9, rel=1e-4) and float(found.weight) == 9  # tokens of the prompts
    assert float(loss(prefix, {"params": params}, batch, PROMPTS.keys).total) > 0


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """(root, lm, data): a random LM whose texts depend on their prompts, and twelve prompts."""
    root = tmp_path_factory.mktemp("lively")
    path = write_lm(root / "lm", context=64)
    model, _ = hf.load(path)
    hf.save(path, model, worlds.lively(model, factor=20), tokens={"eos_token_id": 0})
    texts = ["the", "we", "a long", "the food was", "good", "left", "the room", "and we", "wait for", "bad"]
    texts += ["small plate", "it"]
    (root / "texts.jsonl").write_text("".join(json_line({"text": text}) for text in texts))
    data = stage(root, sources.load_data, dict(source=f"jsonl:{root / 'texts.jsonl'}", split="all"))
    return root, sources.language_model(Session.of(root), str(path), None), data


ASKED = dict(question=" good?", answers=("a", "b"), new=3, turns=1, tries=3, rate=50.0, temperature=1.0)


@pytest.mark.slow
def test_fit(lively):
    """Some of the scores rise, the shifts of those are kept, and the prefix that learns them comes nearer to them."""
    root, lm, data = lively
    asked = self_control.fit(root, lm=lm, data=data, **ASKED)
    control = methods.load(asked, open_lm(lm)[0])
    assert float(jnp.abs(control.answer).sum()) == 2 and control.question.shape[0] > 1 and control.new == 3
    assert control.ends == (0,)
    found = stage(root, self_control.shifts, dict(batch=5), lm=lm, data=data, asked=asked)
    (row,) = found.metrics()
    assert row["prompts"] == 12 and 1 <= row["rose"] < 12 and row["after"] > row["before"]
    kept = found.load()
    assert {len(x) for x in kept.values()} == {row["rose"]} and np.abs(kept["shift"]).max(axis=(1, 2, 3)).min() > 0
    training = dict(steps=20, batch=4, rate=3e-2, warmup=1)
    learned = self_control.fit(root, lm=lm, data=data, kind="prefix", vectors=2, training=training, batch=5, **ASKED)
    errors = [row["error"] for row in learned.metrics() if "error" in row]
    assert len(errors) == 20 and np.mean(errors[-4:]) < np.mean(errors[:4])
    prefix = methods.load(learned, open_lm(lm)[0])
    assert prefix.shared.shape[0] == 2 and prefix.added() == 0 and self_control.neutral(prefix) is None


def test_no_score_that_rises_is_told(lively):
    root, lm, data = lively
    with pytest.raises(InputError, match="no score of 12 prompts rises"):
        self_control.fit(root, lm=lm, data=data, kind="prefix", **ASKED | dict(rate=1e-9, tries=1))
    with pytest.raises(InputError, match=r"tokens is 0, and every prompt of .* is longer"):
        self_control.fit(root, lm=lm, data=data, kind="prefix", tokens=0, **ASKED)


def test_bad_input(small):
    root, lm, data = small
    with pytest.raises(InputError, match="kind is 'gate', expected one of suffix, prefix"):
        self_control.fit(root, lm=lm, data=data, kind="gate", question="good?")
    with pytest.raises(InputError, match="question is ''"):
        self_control.fit(root, lm=lm, data=data, question="")
    with pytest.raises(InputError, match="whose first tokens are the same"):
        self_control.fit(root, lm=lm, data=data, question="good?", answers=(" a", " a"))
    for wrong in ("no", (" a",), (" a", ""), (" a", " b", " c"), (1, 2)):
        with pytest.raises(InputError, match=r"answers is .*, expected two texts"):
            self_control.fit(root, lm=lm, data=data, question="good?", answers=wrong)
    with pytest.raises(InputError, match="batch, vectors: settings of the kind 'prefix', but kind is 'suffix'"):
        self_control.fit(root, lm=lm, data=data, question="good?", vectors=3, batch=4)
    for name in ("temperature", "rate"):
        with pytest.raises(InputError, match=f"{name} is 0, expected a number above 0"):
            self_control.init(LM, jax.random.key(0), **{name: 0})
    with pytest.raises(InputError, match=r"call Control\.bind first"):
        self_control.example(LM, jax.random.key(0)).init(PROMPTS, 4)
    with pytest.raises(InputError, match="take 60 positions"):
        CONTROL.search(worlds.prompts([[1] * 55]))


def test_the_widths_of_the_paper_on_paper():
    """`:paper`, with two of its layers: shapes alone, no array is made."""
    lm = Transformer.llama(vocab=32000, width=4096, depth=2, heads=32, kv_heads=32, mlp_width=11008, context=4096)
    for settings in (dict(length=12, new=50), dict(kind="prefix", length=128)):
        out = worlds.written_on_paper(lm, lambda key, s=settings: self_control.init(lm, key, **s))
        assert out.tokens.shape == (1, 2)
