"""Checkpoints come back whole and exact, on any mesh, or not at all."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ctg_jax.control import Chain, Control
from ctg_jax.mesh.plan import Plan
from ctg_jax.run import checkpoint
from ctg_jax.types import InputError


@struct.dataclass
class Shift(Control):
    vector: jax.Array
    scale: jax.Array
    site: int = struct.field(pytree_node=False, default=1)


def sample():
    return {
        "layers": {"kernel": jnp.arange(32.0).reshape(8, 4), "half": jnp.ones((4,), jnp.bfloat16)},
        "count": jnp.int32(7),
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "list": (np.arange(4, dtype=np.int8), 2.5),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4), 5),
    }


def same(a, b):
    def plain(x):
        key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert plain(x).dtype == plain(y).dtype
        np.testing.assert_array_equal(plain(x), plain(y))


def data_file(path):
    """The largest file of a checkpoint, which holds numbers."""
    return max((p for p in (path / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_round_trip_with_and_without_like(tmp_path):
    tree = sample()
    checkpoint.save(tmp_path / "c", tree, {"data": {"next": 3}})
    got = checkpoint.load(tmp_path / "c", tree)
    same({k: v for k, v in got.items() if k != "list"}, {k: v for k, v in tree.items() if k != "list"})
    assert got["list"][0].dtype == np.int8 and got["list"][1] == 2.5
    loose = checkpoint.load(tmp_path / "c")
    same(loose["layers"], tree["layers"])
    assert loose["empty"].shape == (0, 3) and loose["list"]["1"] == 2.5
    assert jax.random.uniform(loose["key"]) == jax.random.uniform(tree["key"])
    assert checkpoint.read_meta(tmp_path / "c") == {"data": {"next": 3}}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_controls_load_through_an_abstract_like(tmp_path):
    def make(key):
        return Chain((Shift(jax.random.normal(key, (3,)), jnp.float32(2.0), site=4), Control()))

    control = make(jax.random.key(0))
    checkpoint.save(tmp_path / "c", control)
    same(checkpoint.load(tmp_path / "c", jax.eval_shape(make, jax.random.key(1))), control)
    checkpoint.save(tmp_path / "none", Control())
    assert checkpoint.load(tmp_path / "none", Control()) == Control()


def test_saving_again_replaces_and_anything_else_is_left_alone(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": jnp.ones(3)})
    checkpoint.save(tmp_path / "c", {"a": jnp.zeros(3)})
    assert float(checkpoint.load(tmp_path / "c")["a"].sum()) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(InputError, match="not a checkpoint"):
        checkpoint.save(tmp_path / "mine", {"a": jnp.ones(3)})
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_restores_onto_another_mesh(tmp_path):
    a, b = Plan("jit", {"data": 8}), Plan("jit", {"data": 2, "tensor": 2})
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    tree = {"x": jax.device_put(x, NamedSharding(a.mesh, P("data"))), "key": jax.random.key(0)}
    checkpoint.save(tmp_path / "c", tree)
    where = {"x": NamedSharding(b.mesh, P("tensor", "data")), "key": NamedSharding(b.mesh, P())}
    got = checkpoint.load(tmp_path / "c", tree, where)
    assert got["x"].sharding == where["x"] and len(got["x"].sharding.device_set) == 4
    np.testing.assert_array_equal(got["x"], x)
    assert checkpoint.load(tmp_path / "c", tree)["x"].sharding == tree["x"].sharding
    alone = checkpoint.load(tmp_path / "c", jax.eval_shape(lambda: {"x": jnp.zeros((8, 8)), "key": jax.random.key(0)}))
    assert len(alone["x"].sharding.device_set) == 1


def test_every_flipped_bit_is_found_and_its_file_named(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": jnp.arange(1000.0)}, {"k": 1})
    for file in [p for p in (tmp_path / "c").rglob("*") if p.is_file() and p.stat().st_size]:
        good = file.read_bytes()
        flip(file)
        with pytest.raises(checkpoint.DamagedError, match=file.name):
            checkpoint.load(tmp_path / "c")
        file.write_bytes(good)
    checkpoint.load(tmp_path / "c")


def test_truncated_and_missing_files_are_named(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": jnp.arange(1000.0)})
    file = data_file(tmp_path / "c")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=file.name):
        checkpoint.load(tmp_path / "c")
    file.unlink()
    with pytest.raises(InputError, match=f"{file.name} is missing"):
        checkpoint.load(tmp_path / "c")
    with pytest.raises(InputError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nowhere")


def test_pickles_are_refused_and_never_run(tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for name in ("model.pkl", "weights"):
        (tmp_path / name).write_bytes(pickle.dumps(Boom()))
        with pytest.raises(InputError, match=f"{name} is a pickle"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": {"k": jnp.zeros((3, 2))}}, r"'a/k' is float32\[2, 3\] where float32\[3, 2\]"),
        ({"a": {"k": jnp.zeros((2, 3), jnp.bfloat16)}}, "'a/k' is float32"),
        ({"a": {"k": jax.random.split(jax.random.key(0), 2)}}, "'a/k' is float32"),
        ({"a": {"k": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}, "has no 'a/bias'"),
        ({"a": {}}, "has 'a/k', which is not expected"),
    ],
)
def test_another_shape_type_or_family_is_named_by_its_path(tmp_path, like, message):
    checkpoint.save(tmp_path / "c", {"a": {"k": jnp.ones((2, 3))}})
    with pytest.raises(InputError, match=message):
        checkpoint.load(tmp_path / "c", like)


def test_falls_back_to_the_last_whole_step_and_names_the_bad_file(tmp_path, caplog):
    like = {"a": jnp.zeros(100)}
    for step in (2, 4, 6):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"a": jnp.full(100, step)}, {"data": step})
    bad = data_file(checkpoint.step_path(tmp_path, 6))
    flip(bad)
    like = {"a": jnp.zeros(100, jnp.int32)}
    step, tree, meta = checkpoint.load_last(tmp_path, like)
    assert (step, int(tree["a"][0]), meta) == (4, 4, {"data": 4})
    assert bad.name in caplog.text
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.saved_steps(tmp_path) == [6]
    with pytest.raises(InputError, match=bad.name):
        checkpoint.load_last(tmp_path, like)
    assert checkpoint.load_last(tmp_path / "none", like) is None


def test_numbers_too_wide_for_jax_are_refused_not_wrapped(tmp_path):
    with pytest.raises(InputError, match="'n' is int64"):
        checkpoint.save(tmp_path / "c", {"n": 2**40})


def test_manifest_is_plain_json(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": jnp.ones(3)})
    body = json.loads((tmp_path / "c" / "manifest.json").read_text())["body"]
    assert body["leaves"] == {"a": ["float32", [3]]}
