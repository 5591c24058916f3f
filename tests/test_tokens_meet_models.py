"""Where text meets a language model: a tokenizer of the Llama kind through sampling, scoring and embedding; ids without
a row in the model; and choices that a control does not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds
from tokenizers import Tokenizer as Core

from ctg_jax import evaluation
from ctg_jax.control import IDENTITY, Chain
from ctg_jax.controls.codes import coded
from ctg_jax.controls.delta import lora
from ctg_jax.controls.streams import Stream
from ctg_jax.controls.vectors import SoftPrompt
from ctg_jax.data import Tokenizer, load_tokenizer, train_bpe
from ctg_jax.data.tokenizer import pad_rows
from ctg_jax.decode import loop, strategies
from ctg_jax.methods import dexperts, latent_steer, lm_steer
from ctg_jax.models import hf
from ctg_jax.models.decoder import Transformer
from ctg_jax.rewards.embed import lm_embedder
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sampling, sources
from ctg_jax.studies.vectors import decode_vectors
from ctg_jax.types import InputError, Samples, Sampling
from tests.data.sentencepiece import llama_like

TEXTS = ["the food was great", "the hour was loud", "the food was loud", "the foo d"] * 20
LM, PARAMS = worlds.tiny(), worlds.lively(worlds.tiny())
PROMPTS, COMPLETION = [[1, 2], [3]], jnp.array([[4, 5], [6, 7]])


def write(folder, tokenizer, vocab=None):
    """A small random model in Hugging Face layout."""
    lm = Transformer.gpt2(vocab=vocab or tokenizer.vocab, width=16, depth=1, heads=2, context=32)
    hf.save(folder, lm, worlds.lively(lm), tokens={"eos_token_id": tokenizer.eos, "bos_token_id": tokenizer.bos})
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def llama(root, tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("llama"), llama_like(TEXTS))
    return stage(root, sources.load_lm, {"source": str(folder)})


def nats(lm, params, ids, given):
    """Minus the log-probability of all but the first `given` of some ids, in one row without padding."""
    out = lm.apply(params, lm.embed(params, jnp.asarray([ids])), jnp.ones((1, len(ids)), bool))
    logp = jax.nn.log_softmax(out.logits[0].astype(jnp.float32), axis=-1)
    return -sum(float(logp[i - 1, ids[i]]) for i in range(given, len(ids)))


# --- text and ids ----------------------------------------------------------------------------------------------------


def test_samples_hold_the_text_that_was_drawn(llama, monkeypatch):
    lm, params, tokenizer = sampling.opened(llama)
    prompts, texts = ["the food", "the hour was"], [" hour loud", "great"]
    drawn = tokenizer.encode_after(prompts, texts)
    tokens, mask = pad_rows(drawn, 8, 0, left=False)

    def run(lm, params, ask, control, settings, devices):
        logp = jnp.zeros(tokens.shape)
        return Samples(jnp.asarray(tokens), jnp.asarray(mask), logp, jnp.int32(8))

    with monkeypatch.context() as patch:
        patch.setattr(strategies, "run", run)
        (rows,) = sampling.complete(lm, params, tokenizer, prompts, options=sampling.Options(max_new=8, batch=2))
    assert [row["prompt"] + row["text"] for row in rows] == ["the food hour loud", "the hour wasgreat"]
    assert [row["tokens"] for row in rows] == drawn
    (rows,) = sampling.complete(lm, params, tokenizer, prompts, options=sampling.Options(max_new=8, batch=2))
    for row in rows:
        (head,) = tokenizer.encode_prompts([row["prompt"]])
        assert [row["prompt"] + row["text"]] == tokenizer.decode([head + row["tokens"]])


def test_a_scorer_scores_the_tokens_of_the_text_behind_its_prompt(llama):
    lm, params, tokenizer = open_lm(llama)
    scorer = evaluation.LMScorer(lm, params, tokenizer)
    prompt, text = "the food", " hour loud"
    (whole,), (head,) = tokenizer.encode([prompt + text]), tokenizer.encode([prompt])
    found, count = scorer([prompt], [text])
    assert count.tolist() == [len(whole) - len(head)]
    bos = [tokenizer.bos]
    assert found[0] == pytest.approx(nats(lm, params, bos + whole, 1 + len(head)), abs=1e-3)
    rows = evaluation.score([{"prompt": prompt, "text": text}], fluency=scorer)
    alone = nats(lm, params, bos + whole[len(head) :], 1)  # the same tokens after no text
    assert rows[0]["relevance"] == pytest.approx((alone - found[0]) / count[0], abs=1e-3)


def test_a_prompt_that_is_cut_keeps_its_beginning_token(llama):
    lm, params, tokenizer = open_lm(llama)
    scorer = evaluation.LMScorer(lm, params, tokenizer)
    (text,) = tokenizer.encode_after(["the"], [" hour loud"])
    long = tokenizer.encode_prompts(["the food was " * 12])[0]
    room = lm.context - len(text)
    found, _ = scorer.ids([long], [text])
    row = [tokenizer.bos, *long[len(long) - room + 1 :], *text]
    assert len(row) == lm.context
    assert found[0] == pytest.approx(nats(lm, params, row, room), abs=1e-3)


def test_an_embedder_out_of_a_language_model_reads_the_beginning_token(llama):
    lm, params, tokenizer = open_lm(llama)
    embed = lm_embedder(lm, params, tokenizer)
    ids = jnp.asarray([[tokenizer.bos, *tokenizer.encode(["the food"])[0]]])
    states = lm.apply(params, lm.embed(params, ids), jnp.ones(ids.shape, bool)).hidden[0]
    np.testing.assert_allclose(embed(["the food"])[0], states.astype(jnp.float32).mean(0), atol=1e-4)
    assert np.isfinite(embed([""])).all()
    assert embed.version.startswith("mean-of-states-from-bos@")


def test_latent_vectors_learn_and_say_the_tokens_of_the_text(llama, root):
    _, _, tokenizer = sampling.opened(llama)
    record = {"prompt": "the food", "text": " was loud"}
    row, first = latent_steer._sentence(tokenizer, record, 0, True)
    whole = tokenizer.encode(["the food was loud"])[0]
    assert row == [tokenizer.bos, *whole, tokenizer.eos] and first == 1 + len(tokenizer.encode(["the food"])[0])
    control = latent_steer.init(sampling.opened(llama)[0], jax.random.key(0), count=1, choice="vector")
    texts, tokens = decode_vectors(llama, control, np.zeros((1, 16), np.float32), ["the food"], 6)
    head = tokenizer.encode_prompts(["the food"])[0]
    assert "the food" + texts[0] == tokenizer.decode([head + tokens[0]])[0]


def test_words_of_a_steer_are_spelled_as_inside_a_text(llama):
    lm, params, tokenizer = open_lm(llama)
    steer = lm_steer.init(lm, jax.random.key(0), rank=4, deviation=1.0)
    rows = lm_steer.words(steer, lm, params, tokenizer, n=tokenizer.vocab, dimensions=1)
    assert " was" in rows[0]["up"] and "<s>" in rows[0]["up"]


# --- ids without a row -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A model of as many tokens as its tokenizer had before two were added to it."""
    small = train_bpe(TEXTS, 300)
    core = Core.from_str(small.to_json())
    core.add_tokens(["<rating5>", "<rating1>"])
    return write(tmp_path_factory.mktemp("grown"), Tokenizer(core, eos="<|endoftext|>"), small.vocab)


def test_a_model_and_a_tokenizer_that_do_not_fit_are_refused_together(grown, root):
    with pytest.raises(InputError, match=r"the tokenizer of .* has \d+ ids, but the model has \d+ tokens"):
        stage(root, sources.load_lm, {"source": str(grown)})
    lm, params = hf.load(str(grown))
    tokenizer = load_tokenizer(grown)
    assert tokenizer.vocab == lm.vocab + 2 == tokenizer.rows + 2
    for make in (evaluation.LMScorer, lm_embedder):
        with pytest.raises(InputError, match=f"has {lm.vocab + 2} ids, but the model has {lm.vocab} tokens"):
            make(lm, params, tokenizer)


@pytest.mark.parametrize("bad", [LM.vocab, -1])
def test_an_id_without_a_row_is_refused_wherever_a_model_reads_it(bad):
    p, good = worlds.prompts([[1, bad], [3]]), worlds.prompts(PROMPTS)
    words = f"holds the token id {bad}, but the model has {LM.vocab} tokens"
    for call in (
        lambda: loop.generate(LM, PARAMS, p),
        lambda: next(loop.stream(LM, PARAMS, p, IDENTITY, Sampling(max_new=2))),
        lambda: loop.forward(LM, PARAMS, p, COMPLETION),
        lambda: loop.score(LM, PARAMS, p, COMPLETION),
        lambda: loop.score(LM, PARAMS, good, COMPLETION.at[1, 1].set(bad)),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_padding_may_be_any_id():
    p = worlds.prompts(PROMPTS)
    odd = p.replace(tokens=jnp.where(p.mask, p.tokens, LM.vocab))
    np.testing.assert_array_equal(loop.score(LM, PARAMS, odd, COMPLETION), loop.score(LM, PARAMS, p, COMPLETION))


# --- choices that a control does not have ----------------------------------------------------------------------------


def choosing(name):
    """A control that reads `prompts.cond["pick"]` among two."""
    key = jax.random.key(0)
    if name == "soft prompt":
        return SoftPrompt(jax.random.normal(key, (2, 3, LM.width)), choice="pick")
    if name == "code":
        delta = lora(key, jax.eval_shape(LM.init, key), 2)
        return coded(key, delta, LM.width, 2).replace(cond="pick")
    if name == "latent vector":
        control = latent_steer.init(LM, key, count=2, choice="pick")
        return control.replace(z=jax.random.normal(key, control.z.shape))
    stream = Stream(control=choosing("soft prompt"), lm=LM)
    return Chain((IDENTITY, dexperts.experts(anti=stream)))


@pytest.mark.parametrize("name", ["soft prompt", "code", "latent vector", "prompt of an expert"])
def test_class_7_of_2_is_refused_and_never_read_as_another(name):
    control = choosing(name)
    for bad in (7, 2, -1):
        p = worlds.prompts(PROMPTS, cond={"pick": jnp.array([1, bad])})
        for call in (
            lambda p=p: loop.generate(LM, PARAMS, p, control),
            lambda p=p: loop.forward(LM, PARAMS, p, COMPLETION, control),
            lambda p=p: loop.score(LM, PARAMS, p, COMPLETION, control),
        ):
            with pytest.raises(
                InputError, match=rf"cond\['pick'\] is {bad} in row 1, but the control has 2: expected a"
            ):
                call()
        inside = jax.jit(lambda p: loop.forward(LM, PARAMS, p, COMPLETION, control))(p)
        assert np.isnan(inside[1]).all() and np.isfinite(inside[0]).all()
    good = worlds.prompts(PROMPTS, cond={"pick": jnp.array([1, 0])})
    assert np.isfinite(loop.forward(LM, PARAMS, good, COMPLETION, control)).all()


def test_a_choice_that_is_no_whole_number():
    p = worlds.prompts(PROMPTS, cond={"pick": jnp.array([0.0, 1.0])})
    with pytest.raises(InputError, match="expected whole ones: the class of each row"):
        loop.generate(LM, PARAMS, p, choosing("soft prompt"))
