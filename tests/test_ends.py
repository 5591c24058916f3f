"""Every id that ends a text ends it: in decoding, latents, diffusion, rules of length and tags."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax.data import load_tokenizer, to_prompts
from ctg_jax.data.tags import TAGS, tag_table
from ctg_jax.decode import loop, strategies
from ctg_jax.decode.rows import is_end
from ctg_jax.methods import diffusion_lm, latent_steer, mdlm
from ctg_jax.models import word_diffusion
from ctg_jax.models.word_control import energy
from ctg_jax.run.stage import open_lm, stage
from ctg_jax.stages import sampling, sources
from ctg_jax.studies.vectors import decode_vectors
from ctg_jax.types import InputError, Sampling
from tests.experiments.tiny_lm import write_lm

PROMPT = "the food"


def _write(folder, **ids):
    write_lm(folder)
    for file, given in ids.items():
        path = folder / f"{file}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | {"eos_token_id": given}))
    return folder


def _written(lm, greedy):
    """Six tokens that the LM writes after the prompt while nothing ends it."""
    model, params, tokenizer = open_lm(lm)
    prompts = to_prompts(tokenizer, [PROMPT], 0, ids=[(0, 0)])  # the first sample of the first prompt
    return np.asarray(loop.generate(model, params, prompts, sampling=Sampling(6, greedy=greedy)).tokens[0]).tolist()


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A language model that writes an end at its fourth token, the likeliest one at its first; and these two."""
    root = tmp_path_factory.mktemp("runs")
    free = stage(root, sources.load_lm, {"source": str(_write(root / "free"))})
    ends = _written(free, False)[3], _written(free, True)[0]
    model = _write(root / "several", config=[0, 1], generation_config=[0, *ends])
    return stage(root, sources.load_lm, {"source": str(model)}), *ends


def test_ends_of_a_tokenizer(tmp_path):
    """generation_config.json counts before config.json, and the tokenizer's own end is always one."""
    one = load_tokenizer(_write(tmp_path / "one", config=0))
    assert (one.eos, one.ends) == (0, (0,))
    several = load_tokenizer(_write(tmp_path / "several", config=[0, 5]))
    assert (several.eos, several.ends) == (0, (0, 5))
    both = load_tokenizer(_write(tmp_path / "both", config=[0, 5], generation_config=[261, 7]))
    assert (both.eos, both.ends) == (0, (0, 261, 7))
    assert both.before_end([3, 4, 7, 3]) == [3, 4] and both.before_end([3, 4]) == [3, 4]
    both.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").ends == both.ends

    unnamed = _write(tmp_path / "unnamed", config=[3, 5], generation_config=[7, 5])
    (unnamed / "tokenizer_config.json").write_text("{}")
    assert (load_tokenizer(unnamed).eos, load_tokenizer(unnamed).ends) == (7, (7, 5))
    assert load_tokenizer(_write(tmp_path / "odd", config=[-1, 99999])).ends == (0,)
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is 'x'"):
        load_tokenizer(_write(tmp_path / "bad", generation_config="x"))


def test_the_ends_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = _write(tmp_path, config=[0, 5], generation_config=[0, 7])
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).generation_config.eos_token_id
    assert load_tokenizer(folder).ends == tuple(theirs)


def test_decoding_stops_at_every_end(lm):
    artifact, drawn, _ = lm
    model, params, tokenizer = open_lm(artifact)
    ((row,),) = sampling.complete(model, params, tokenizer, [PROMPT], options=sampling.Options(max_new=6))
    assert len(row["tokens"]) == 4 and row["tokens"][-1] == drawn
    assert row["text"] == tokenizer.decode([row["tokens"][:-1]])[0]  # an end leaves no trace, special token or not


def test_min_length_bans_every_end(lm):
    artifact, *ends = lm
    model, params, tokenizer = open_lm(artifact)
    control = sampling.build(artifact, filter={"min_length": 5})
    ((row,),) = sampling.complete(model, params, tokenizer, [PROMPT], control, sampling.Options(max_new=6))
    assert len(row["tokens"]) >= 5 and not {0, *ends} & set(row["tokens"][:5])
    given = sampling.build(artifact, filter={"min_length": 5, "eos": (1,)})
    assert np.flatnonzero(given.parts[0].eos).tolist() == [1]


def test_latents_stop_at_every_end(lm):
    artifact, _, likeliest = lm
    model, _, _ = open_lm(artifact)
    control = latent_steer.init(model, jax.random.key(0), count=1, choice="vector")
    texts, tokens = decode_vectors(artifact, control, np.zeros(control.z.shape, np.float32), [PROMPT], 6)
    assert tokens == [[likeliest]] and texts == [""]


def test_tags_know_every_end(lm):
    artifact, *ends = lm
    assert set(tag_table(open_lm(artifact)[2])[[0, *ends]]) == {TAGS.index("end")}


def _first_ends(samples, ends):
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    for row, real in zip(tokens, mask):
        written = row[real]
        assert not np.isin(written[:-1], ends).any() and (np.isin(written[-1], ends) or len(written) == len(row))
    return mask.sum(1)


def test_masked_diffusion_ends_at_every_end():
    world = worlds.tiny(vocab=7)
    control = mdlm.init(world, jax.random.key(0), width=16, depth=1, heads=2, length=12)
    prompts = worlds.prompts([[1, 2, 3], [4], [5, 6], [1, 1]])
    one, several = (strategies.run(world, {}, prompts, control, Sampling(8, eos=e)) for e in ((0,), (0, 3, 5)))
    assert _first_ends(several, (0, 3, 5)).sum() < _first_ends(one, (0,)).sum()


def test_word_diffusion_ends_at_every_end_and_a_length_counts_to_the_first():
    world = worlds.tiny(vocab=7)
    shape = dict(dim=4, width=16, heads=2, depth=1, length=12, calls=4)
    control = diffusion_lm.init(world, jax.random.key(0), **shape)
    prompts = worlds.prompts([[1, 2, 3], [4], [5, 6]])
    one, several = (strategies.run(world, {}, prompts, control, Sampling(8, eos=e)) for e in ((0,), (0, 6)))
    assert _first_ends(several, (0, 6)).sum() < _first_ends(one, (0,)).sum()

    table, z = jnp.eye(3), jax.random.normal(jax.random.key(1), (1, 3, 3))
    p = np.exp(np.asarray(word_diffusion.words(table, z, jnp.zeros(1))))[0]
    aims, free, tags = {"length": jnp.asarray([1])}, jnp.ones((1, 3), bool), jnp.zeros(3, jnp.int32)
    found = energy(table, aims, free, (0, 2), tags, None, {})(z, jnp.zeros(1))
    np.testing.assert_allclose(found, [-np.log(p[0, 1] * p[1, 0] * p[2, 0])], rtol=1e-5)


def test_where_a_row_ends():
    tokens = jnp.asarray([[3, 5, 0, 5], [1, 1, 1, 1]])
    assert strategies.cut(tokens, Sampling(eos=(0, 5)))[1].tolist() == [[True, True, False, False], [True] * 4]
    assert strategies.cut(tokens, Sampling())[1].all()
    assert is_end(tokens, (0, 5)).tolist() == [[False, True, True, True], [False] * 4]
