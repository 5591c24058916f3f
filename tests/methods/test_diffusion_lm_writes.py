"""How Diffusion-LM writes: what is given stays, rows are the same alone, what is fitted reads back and goes on where it
stopped, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import worlds

from ctg_jax import methods
from ctg_jax.data.labels import mentioned
from ctg_jax.data.pipeline import Batches
from ctg_jax.data.tags import TAGS, tag_table
from ctg_jax.data.tokenizer import train_bpe
from ctg_jax.decode import strategies
from ctg_jax.learn.whole_rows import start_token
from ctg_jax.methods import diffusion_lm
from ctg_jax.run import stage
from ctg_jax.run.stage import open_lm
from ctg_jax.stages import sources
from ctg_jax.stages.sampling import Options, complete
from ctg_jax.types import InputError, Sampling


@pytest.fixture(scope="module")
def net():
    """A random network for rows of 12 tokens, with a classifier."""
    lm = worlds.tiny(vocab=11)
    control = diffusion_lm.init(lm, jax.random.key(0), dim=4, width=16, heads=2, depth=2, length=12, calls=8,
                                fields={"label": 2}, reader_width=8, reader_depth=1)  # fmt: skip
    louder = jax.tree.map(lambda x: 5 * x, control.params["net"])
    tags = jnp.arange(11, dtype=jnp.int32) % len(TAGS)
    return lm, control.replace(params=control.params | {"net": louder}, tags=tags)


ROWS, SAMPLING = [[3, 4], [5], [6, 7, 8]], Sampling(max_new=8, eos=(0,))
COND = {
    "label": np.array([1, -1, 0]),
    "length": np.array([4, 5, -1]),
    "tags": np.array([[1, 2, -1], [-1, -1, -1], [4, -1, 5]]),
    "words": np.array([[-1, -1, 7, -1, 9], [-1] * 5, [10, 1, -1, -1, 2]]),
}


def write(net, rows=slice(None), scale=1.0, cond=COND, length=None):
    lm, control = net
    prompts = worlds.prompts(ROWS, length, cond=dict(cond))
    prompts = jax.tree.map(lambda x: x[rows], prompts)
    scale = jnp.full(len(prompts.keys), scale) if np.ndim(scale) == 0 else scale
    return strategies.run(lm, None, prompts, methods.with_strength(control, scale), SAMPLING)


@pytest.fixture(scope="module")
def guided(net):
    return write(net)


def test_given_words_are_kept_exactly_on_both_sides(net, guided):
    only = write(net, cond={"words": COND["words"]})
    for out in (only, guided):
        kept = (COND["words"] >= 0) & np.asarray(out.mask)[:, :5]
        assert kept.any() and (np.asarray(out.tokens)[:, :5][kept] == COND["words"][kept]).all()


def test_strength_0_is_the_unguided_model_to_the_bit(net, guided):
    free, off = write(net, cond={"words": COND["words"]}), write(net, scale=0.0)
    np.testing.assert_array_equal(free.tokens, off.tokens)
    assert (np.asarray(guided.tokens) != np.asarray(off.tokens)).any()
    mixed = write(net, scale=np.array([0.0, 1.0, 0.0]))
    for i, same in enumerate((off, guided, off)):
        np.testing.assert_array_equal(mixed.tokens[i], same.tokens[i])


def test_a_row_alone_is_as_in_its_batch_and_padding_does_not_matter(net, guided):
    for i in range(3):
        alone = write(net, rows=slice(i, i + 1), length=5)
        np.testing.assert_array_equal(alone.tokens[0], guided.tokens[i])
        np.testing.assert_array_equal(alone.mask[0], guided.mask[i])
    assert np.all(np.asarray(guided.logp) == 0) and int(guided.generated) == 8


def test_the_mask_ends_with_the_first_end_token(net):
    words = np.array([[-1, -1, 0, -1, -1], [-1, 0, 3, 0, -1], [-1] * 5])
    out = write(net, cond={"words": words})
    tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
    assert mask[0].sum() <= 3 and mask[1].sum() <= 2
    for row, real in zip(tokens, mask):
        written = row[real]
        assert 0 not in written[:-1] and (len(written) == 8 or written[-1] == 0)
        assert (row[~real] == SAMPLING.pad).all()


def test_an_empty_prompt_gives_no_token_of_a_row(net):
    lm, control = net
    prompts = worlds.prompts([[0], [0]])
    out = strategies.run(lm, None, prompts, control.replace(how=dataclasses.replace(control.how, start=0)), SAMPLING)
    rows = diffusion_lm.infill(control, jnp.zeros((2, 12), int), jnp.zeros((2, 12), bool), {}, prompts.keys, ends=(0,))
    np.testing.assert_array_equal(out.tokens, jnp.where(out.mask, rows[:, :8], SAMPLING.pad))
    assert (np.asarray(out.tokens) != np.asarray(strategies.run(lm, None, prompts, control, SAMPLING).tokens)).any()


FIT = dict(dim=4, width=8, heads=2, depth=1, length=24, training=dict(steps=5, batch=4, warmup=1, save_every=2))
GUIDE = dict(fields={"label": 2}, reader_width=8, reader_depth=1, training=dict(steps=2, batch=4))


def test_fit_leaves_a_model_that_loads_and_writes(small):
    root, lm, data = small
    aim = dict(target={"label": 1, "length": 3, "tags": ["adj", None, "noun"]}, calls=3)
    artifact = diffusion_lm.fit(root, lm=lm, data=data, guide=GUIDE, aim=aim, **FIT)
    model, params, tokenizer = open_lm(lm)
    control = methods.load(artifact, model)
    assert control.target == (("label", 1), ("length", 3), ("tags", (TAGS.index("adj"), -1, TAGS.index("noun"))))
    assert control.how.start == start_token(tokenizer) is not None
    np.testing.assert_array_equal(control.tags, tag_table(tokenizer))
    (rows,) = complete(model, params, tokenizer, ["so good"], control, Options(n=2, max_new=5))
    assert len(rows) == 2 and all(0 < len(r["tokens"]) <= 5 for r in rows)


def test_training_goes_on_where_it_was_cut_short(small, tmp_path, monkeypatch):
    root, lm, data = small
    whole = diffusion_lm.fit(root, lm=lm, data=data, **FIT).load()
    reads, real = [], Batches.__next__

    def cut(self):
        reads.append(1)
        if len(reads) == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Batches, "__next__", cut)
    with pytest.raises(KeyboardInterrupt):
        diffusion_lm.fit(tmp_path, lm=lm, data=data, **FIT)
    reads[:] = [0] * 10
    again = diffusion_lm.fit(tmp_path, lm=lm, data=data, **FIT).load()
    assert len(reads) - 10 < 5
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_tags_of_tokens():
    tokenizer = train_bpe(["The soup was delicious and the waiter was truly rude ."] * 50, 320)
    tags = tag_table(tokenizer)
    tagged = {tokenizer.decode([[i]])[0]: TAGS[t] for i, t in enumerate(tags)}
    wanted = {" soup": "noun", " was": "verb", " delicious": "adj", " the": "det", " truly": "adv", "The": "det"}
    assert {w: tagged[w] for w in wanted} == wanted
    assert TAGS[tags[tokenizer.eos]] == "end" and tagged["."] == "punct" and tagged["l"] == "part"


def test_bad_input(net):
    lm, control = net
    init = lambda **hp: diffusion_lm.init(lm, jax.random.key(0), **{"width": 16, "length": 12, **hp})  # noqa: E731
    for message, call in {
        "sampler is 'euler', expected": lambda: init(sampler="euler"),
        "expected clamp from 0 to 1": lambda: init(clamp=2.0),
        "calls from 1": lambda: init(calls=0),
        "fields is .* expected names other than length": lambda: init(fields={"length": 2}),
        "target names 'mood', expected one of": lambda: init(target={"mood": 1}),
        "target label is 2, expected a class": lambda: init(fields={"label": 2}, target={"label": 2}),
        "target tags has 'verbs', expected": lambda: init(target={"tags": ["verbs"]}),
        "cond names 'mood', expected one of": lambda: write(net, cond={"mood": np.zeros(3, int)}),
        r"tags has shape \(3,\), expected \[3, up to 8\]": lambda: write(net, cond={"tags": np.zeros(3, int)}),
        r"words has shape \(3, 9\)": lambda: write(net, cond={"words": np.zeros((3, 9), int)}),
        "words has values from 11 to 11, expected": lambda: write(net, cond={"words": np.full((3, 2), 11)}),
        r"length has values from 9 to 9, expected -1 \(none\) to 8": lambda: write(net, cond={"length": np.full(3, 9)}),
        "label has values from 2 to 2": lambda: write(net, cond={"label": np.full(3, 2)}),
        "rows of 12 tokens were trained on": lambda: strategies.run(
            lm, None, worlds.prompts(ROWS), control, Sampling(max_new=10)
        ),
        "control has 11 tokens and the model 3": lambda: strategies.run(
            worlds.tiny(vocab=3), None, worlds.prompts(ROWS), control, Sampling()
        ),
    }.items():
        with pytest.raises(InputError, match=message):
            call()


def test_labels_without_a_text_are_named_before_a_network_is_trained(small, tmp_path):
    _, lm, data = small
    with pytest.raises(InputError, match="labelled texts has the label 2, but a classifier of 3"):
        diffusion_lm.fit(tmp_path, lm=lm, data=data, guide=GUIDE | dict(fields={"label": 3}), **FIT)
    assert not list(tmp_path.glob("diffusion_lm*"))


def test_how_often_a_control_holds_by_hand():
    from experiments.diffusion_controls import WITHIN, columns, holds

    rows, tags = [[3, 4, 0], [3, 0], [4, 3, 4]], np.asarray([0, 0, 0, 9, 10])
    liked = {"label": np.array([True, False, True]), "food": np.array([False, False, True])}
    assert (TAGS[9], TAGS[10]) == ("adj", "noun")
    for name, value, wanted in (
        ("label", 1, [True, False, True]),
        ("label", 0, [False, True, False]),
        ("food", 1, [False, False, True]),
        ("food", 0, [True, True, False]),
        ("length", 2, [True, False, False]),  # the last row does not end
        (WITHIN, 4, [True, False, False]),
        (WITHIN, 1, [True, True, False]),
        ("tags", ["adj", None], [True, True, False]),
        ("tags", [None, "adj", "noun"], [False, False, True]),
    ):
        assert holds(name, value, rows, liked, tags, (0,)).tolist() == wanted
    asked = [dict(tags=["adj"], length=2), {}, dict(tags=["noun"], length=2)]  # two arms ask for different tags
    assert list(columns(asked)) == ["tags ['adj']", "length 2", "tags ['noun']", f"{WITHIN} 2"]
    with pytest.raises(InputError, match="target food is 2, but a judge tells 1 from 0 only"):
        holds("food", 2, rows, liked, tags, (0,))
    with pytest.raises(InputError, match="target area has no judge: give one of this name under judges"):
        holds("area", 1, rows, liked, tags, (0,))


E2E = [
    ('"name[Ali], food[Chinese], area[riverside]"', '"Ali, by the river, cooks Chinese dishes."'),
    ('"name[Zoe], area[city centre]"', "Zoe is in the centre."),
    ('"name[Bo], food[Italian]"', "Bo is Italian."),
    ('"name[Cy], food[Fast food], area[riverside]"', '"Cy, fast food at the riverside."'),
] * 15


def test_the_texts_of_e2e_have_every_class_that_its_classifier_is_asked_for(data_dir, tmp_path):
    from configs import diffusion_lm as config

    arm = config.get_config("e2e").to_dict()["methods"]["food_and_area"]
    records = stage.stage(tmp_path, sources.load_data, arm["data"]).rows("data.jsonl")
    for name, options in arm["fit"]["guide"]["mentions"].items():
        found = {mentioned(r, options, "mr", "it") for r in records}
        assert found == set(range(1 + len(options))), name


def test_the_configuration_of_e2e_on_files_in_its_format(small, tmp_path, monkeypatch):
    """Its data are read, its classes are those of the meaning representations, and its judges know them."""
    from configs import diffusion_lm as config
    from experiments import experiment

    root, lm, _ = small
    folder = tmp_path / "e2e" / "orig"
    folder.mkdir(parents=True)
    for name in ("devset", "testset_w_refs"):
        (folder / f"{name}.csv").write_text("mr,ref\n" + "".join(f"{mr},{ref}\n" for mr, ref in E2E))
    monkeypatch.setenv("CTG_DATA_DIR", str(tmp_path))
    settings = config.get_config("e2e").to_dict()
    arms = experiment.check(settings)
    assert {"food", "tags", "span", "length", "food_and_length", "agreeing"} <= set(arms)
    prompts = stage.stage(root, sources.load_data, settings["prompts"]).rows("data.jsonl")
    assert [p["text"] for p in prompts[:2]] == ["Ali,", "Zoe"] and len(prompts) == 50
    data = stage.stage(root, sources.load_data, arms["food"].data)
    assert data.rows("data.jsonl")[0]["text"].endswith("Chinese dishes.")
    guide = arms["food"].fit["guide"] | dict(reader_width=8, reader_depth=1, training=dict(steps=2, batch=4))
    made = diffusion_lm.fit(root, lm=lm, data=data, guide=guide, aim=dict(target=dict(food=1, area=1)), **FIT)
    control = methods.load(made, open_lm(lm)[0])
    assert dict(control.fields) == dict(food=2, area=2) and control.target == (("area", 1), ("food", 1))
    assert [mentioned(r, guide["mentions"]["food"], "mr", "it") for r in data.rows("data.jsonl")[:4]] == [1, 0, 0, 0]
    foods = ("food[Chinese]", "food[Italian]", "food[Fast food]")
    assert [mentioned(r, foods, "mr", "it") for r in data.rows("data.jsonl")[:4]] == [1, 0, 2, 3]
    assert config.chinese("It is", " a chinese place") == 1 and config.chinese("", "an Indian place") == 0
    assert config.riverside("", "near the River") == 1 and config.riverside("", "a driver") == 0
    with pytest.raises(InputError, match=r"record 0 of .* has no text under 'facts': name the field"):
        diffusion_lm.fit(root, lm=lm, data=data, guide=guide | dict(reads="facts"), **FIT)
    with pytest.raises(InputError, match=r"mentions food is 'food\[Chinese\]', expected a list of texts, under a name"):
        diffusion_lm.fit(root, lm=lm, data=data, guide=guide | dict(mentions=dict(food="food[Chinese]")), **FIT)
    with pytest.raises(InputError, match="fields and mentions are empty"):
        diffusion_lm.fit(root, lm=lm, data=data, guide=dict(reads="mr"), **FIT)
