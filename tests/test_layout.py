"""The layout of a run: what --mesh says, where arrays lie under it, and that nothing else depends on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctg_jax import tree
from ctg_jax.decode import loop
from ctg_jax.learn import losses, train
from ctg_jax.learn.optimizer import optimizer
from ctg_jax.mesh import layout
from ctg_jax.methods import finetune
from ctg_jax.models.hf import tensors
from ctg_jax.models.layers import matmul
from ctg_jax.run.session import Session
from ctg_jax.run.stage import open_lm, stage, write_jsonl
from ctg_jax.stages import sampling, sources
from ctg_jax.types import InputError, Prompts, Sampling
from experiments import hosts
from tests.experiments.tiny_lm import write_lm


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    root = tmp_path_factory.mktemp("layout")
    return stage(root, sources.load_lm, {"source": str(write_lm(root / "lm"))})


def prompts(rows=8):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (rows, 4)), jnp.int32)
    return Prompts(tokens=tokens, mask=jnp.ones(tokens.shape, bool), keys=jax.random.split(jax.random.key(1), rows))


def held(params):
    """Bytes on the first device."""
    first = jax.local_devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards if s.device == first)


@pytest.mark.parametrize(
    ("text", "axes", "sharded"),
    [
        ("data=8", {"data": 8}, False),
        ("fsdp=-1", {"data": 8}, True),
        ("fsdp=2,tensor=4", {"data": 2, "tensor": 4}, True),
        ("tensor=2", {"data": 4, "tensor": 2}, False),
        ("data=2", {"data": 2}, False),
    ],
)
def test_a_mesh_in_a_line(text, axes, sharded):
    found = layout.read(text)
    assert found.sharded == sharded
    with layout.laid_out(found):
        assert dict(layout.training().axes) == dict(layout.local_plan().axes) == axes
        used = {name for _, spec in layout.training().rules for name in spec if name}
        assert used == ({"data", "tensor"} if sharded else {"tensor"})
    assert layout.local_plan() is None and layout.training().size == 1


@pytest.mark.parametrize("text", ["rows=2", "data", "data=0", "tensor=-1", "data=2,fsdp=2", "data=2,data=4", ""])
def test_a_mesh_that_cannot_be_read(text):
    with pytest.raises(InputError, match=r"expected data=N or fsdp=N|not both"):
        layout.read(text)


@pytest.mark.parametrize("text", ["tensor=3", "data=3,tensor=4", "data=16"])
def test_a_mesh_that_does_not_fit_the_devices(text):
    with layout.laid_out(layout.read(text)), pytest.raises(InputError, match="do not fit the 8 devices"):
        layout.training()


def test_several_processes_use_all_their_devices(monkeypatch):
    monkeypatch.setattr(layout.processes, "count", lambda: 2)
    with layout.laid_out(layout.read("data=4")), pytest.raises(InputError, match="leave out some of the 8 devices"):
        layout.training()


def test_completions_are_split_in_one_way_only(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert len(layout.accelerators()) == 8
    with layout.laid_out(layout.read("fsdp=4,tensor=2")):
        assert not layout.accelerators()


def test_weights_lie_split_and_decode_the_same(lm):
    model, params, _ = open_lm(lm)
    want = loop.generate(model, params, prompts(), sampling=Sampling(max_new=6))
    with layout.laid_out(layout.read("fsdp=4,tensor=2")):
        same, split, _ = open_lm(lm)
    # Decoding follows the weights, not the layout that is in force.
    out = loop.generate(same, split, prompts(), sampling=Sampling(max_new=6))
    scores = loop.score(same, split, prompts(), out.tokens)
    uneven = loop.generate(same, split, prompts(3), sampling=Sampling(max_new=6))
    begun = loop.begin(same, split, prompts(), sampling=Sampling(max_new=6))
    assert same == model and held(split) < held(params) / 4
    assert len(out.tokens.sharding.device_set) == len(begun.z.sharding.device_set) == 8
    assert len(loop.generate(model, params, prompts(), sampling=Sampling(max_new=6)).tokens.sharding.device_set) == 1
    assert out.tokens.tolist() == want.tokens.tolist()
    alone = loop.generate(model, params, prompts(3), sampling=Sampling(max_new=6))
    assert uneven.tokens.tolist() == alone.tokens.tolist()
    np.testing.assert_allclose(scores, want.logp, atol=1e-5)


def learn(lm, folder):
    """A change of all weights after three steps on one batch of eight rows."""
    model, params, _ = open_lm(lm)
    control = finetune.init(model, jax.random.key(0), kind="full")
    tx = optimizer(1e-2, trained="changes/.*")
    state = train.init_state(control, tx, jax.random.key(2))
    tokens = np.random.default_rng(1).integers(0, 50, (8, 6)).astype(np.int32)
    batch = dict(tokens=tokens, mask=np.ones((8, 6), bool), ids=np.arange(8))
    step = train.make_step(losses.control_loss(model), tx)
    return train.loop(
        folder, state, step, Same(batch), steps=3, save_every=2, frozen={"params": params}, progress=False
    )


class Same:
    """One batch for ever, which says its rows as `data.pipeline` does."""

    size = 8

    def __init__(self, batch):
        self.batch = batch

    def __next__(self):
        return self.batch


@pytest.fixture(scope="module")
def alone(lm, tmp_path_factory):
    return learn(lm, tmp_path_factory.mktemp("alone"))


def same(a, b):
    tree.map_with_path(lambda path, x, y: np.testing.assert_allclose(x, y, atol=1e-5, err_msg=path), a.params, b.params)
    assert int(a.step) == int(b.step) == 3


def test_training_splits_the_states_and_ends_the_same(lm, alone, tmp_path):
    with layout.laid_out(layout.read("fsdp=4,tensor=2")):
        split = learn(lm, tmp_path)
        again = learn(lm, tmp_path)  # what the last checkpoint holds
    assert held(split.opt_state) < held(alone.opt_state) / 4
    same(alone, split)
    same(alone, again)


def test_without_a_mesh_accelerators_share_the_rows(lm, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [dict(layout.training(rows).axes)["data"] for rows in (None, 8, 12, 7)] == [1, 8, 4, 1]
    shared = learn(lm, tmp_path)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(shared.params)} == {1}  # where all else lies
    same(alone, shared)


def test_blocks_are_computed_again_where_asked_for(lm):
    with layout.laid_out(layout.Layout(remat=True, mesh=False)):
        assert open_lm(lm)[0].remat
    assert not open_lm(lm)[0].remat


def test_bfloat16_is_another_artifact_of_the_same_model(lm, tmp_path):
    half = stage(tmp_path, sources.load_lm, {"source": lm.spec["config"]["source"], "dtype": "bfloat16"})
    model, params, _ = open_lm(half)
    assert half.id != lm.id and half.fingerprint == lm.fingerprint
    assert model.dtype == "bfloat16" and {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(finetune.init(model, jax.random.key(0)))} == {"float32"}
    with pytest.raises(InputError, match="dtype is 'half', expected 'float32' or 'bfloat16'"):
        stage(tmp_path, sources.load_lm, {"source": lm.spec["config"]["source"], "dtype": "half"})


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_a_stage_trained_by_pmap_samples_the_same(lm, tmp_path, devices):
    """The same tiny training under jit and pmap: parameters equal to 1e-6, the same tokens sampled."""
    data = stage(tmp_path, records)
    found = []
    for mode in ("jit", "pmap"):
        session = Session(tmp_path / mode, layout=layout.read(f"data={devices}", mode=mode))
        training = dict(steps=3, batch=8, tokens=16, rate=1e-3)
        control = finetune.fit(session, lm=lm, data=data, adapter={"kind": "full"}, training=training)
        samples = stage(
            session,
            sampling.sample,
            dict(n=4, max_new=6, batch=8, strengths=[None]),
            lm=lm,
            prompts=data,
            controls=[control],
        )
        found.append((control.load(), [row["tokens"] for row in samples.rows("samples.jsonl")]))
    (jit, wanted), (pmap, tokens) = found
    tree.map_with_path(lambda path, x, y: np.testing.assert_allclose(x, y, atol=1e-6, err_msg=path), jit, pmap)
    assert tokens == wanted
    with layout.laid_out(layout.read(f"data={devices}", mode="pmap")):
        assert layout.training(8).mode == "pmap" and layout.training(8).size == devices


def records(run):
    write_jsonl(run.path / "data.jsonl", [{"text": text} for text in ("a good film", "the food was bad", "fine rooms")])


def test_pmap_is_asked_for_by_a_flag():
    assert hosts.chosen(["--plan=pmap"]).mode == "pmap" and hosts.chosen([]).mode == "jit"
    with layout.laid_out(hosts.chosen(["--plan=pmap"])):
        assert [layout.training(rows).size for rows in (None, 8, 6)] == [8, 8, 2]
    for argv, words in ((["--plan=vmap"], "expected jit or pmap"), (["--plan=pmap", "--mesh=fsdp=8"], "replicates")):
        with pytest.raises(InputError, match=words):
            hosts.chosen(argv)


def test_products_on_accelerators_have_the_precision_that_was_chosen(monkeypatch):
    def chosen(argv):
        with layout.laid_out(hosts.chosen(argv)):
            x = jnp.ones((2, 3))
            (product,) = (
                e for e in jax.make_jaxpr(lambda a: matmul(a, a, "float32"))(x).eqns if "dot" in e.primitive.name
            )
            return product.params["precision"]

    assert chosen([]) is None and chosen(["--precision=highest"]) is None  # a CPU computes in float32
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for argv, name in (([], "HIGH"), (["--precision=highest"], "HIGHEST"), (["--precision=default"], "DEFAULT")):
        assert {p.name for p in chosen(argv)} == {name}
    with jax.default_matmul_precision("highest"):  # as the laws and the parity tests have it on an accelerator
        assert {p.name for p in chosen([])} == {"HIGHEST"}
    with pytest.raises(InputError, match="--precision=exact: expected one of default, high, highest"):
        hosts.chosen(["--precision=exact"])


@pytest.mark.parametrize("text", [None, "fsdp=4,tensor=2"])
def test_an_import_reads_one_leaf_or_shard_at_a_time_in_its_own_dtype(lm, tmp_path, monkeypatch, text):
    read, real = [], tensors.Checkpoint.read

    def counted(self, leaf, index, dtype):
        read.append(real(self, leaf, index, dtype))
        return read[-1]

    monkeypatch.setattr(tensors.Checkpoint, "read", counted)
    half = stage(tmp_path, sources.load_lm, {"source": lm.spec["config"]["source"], "dtype": "bfloat16"})
    assert not read  # the import itself only checks the files
    with layout.laid_out(layout.read(text)):
        _, params, _ = open_lm(half)
    leaves = jax.tree.leaves(params)
    assert {x.dtype.name for x in read} == {"bfloat16"}
    assert max(x.nbytes for x in read) == max(x.addressable_shards[0].data.nbytes for x in leaves)
    assert sum(x.nbytes for x in read) == sum(x.nbytes for x in leaves)  # each shard once
    assert held(params) <= sum(x.nbytes for x in leaves) * (1 if text is None else 1 / 4)
