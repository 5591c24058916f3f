"""What a session owns: one copy of each language model and encoder, digests computed once, a tally, and dry runs."""

import json

import jax
import numpy as np
import pytest

from ctg_jax import io
from ctg_jax.data import train_bpe
from ctg_jax.mesh import layout
from ctg_jax.models import hf
from ctg_jax.models.encoder import Encoder
from ctg_jax.models.hf import tensors
from ctg_jax.rewards import embed
from ctg_jax.run.artifact import Artifact
from ctg_jax.run.session import Session
from ctg_jax.run.stage import UnfinishedError, open_lm, stage, write_jsonl
from ctg_jax.stages import judges, sampling, sources
from tests.experiments.tiny_lm import write_lm


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(write_lm(tmp_path_factory.mktemp("model") / "lm"))


def figure(run, *, x=1, before=None):
    run.log(x=x)
    assert isinstance(run.session, Session)


def test_a_language_model_is_read_once_and_in_memory_once(source, tmp_path, monkeypatch):
    read, real = [], tensors.Checkpoint.read
    monkeypatch.setattr(tensors.Checkpoint, "read", lambda self, *a: read.append(a) or real(self, *a))
    session = Session(tmp_path)
    lm = stage(session, sources.load_lm, {"source": source})
    again = stage(session, sources.load_lm, {"source": source})
    assert lm.session is again.session is session
    params = open_lm(lm)[1]
    once = len(read)
    assert open_lm(again)[1] is params and len(read) == once
    unstacked = sampling.opened(lm)[1]
    assert sampling.opened(again)[1] is unstacked and len(read) == once
    assert [kept[1] for kept in session._kept["lm"].values()] == [unstacked]  # in one form only
    jax.tree.map(np.testing.assert_array_equal, params, open_lm(lm)[1])


def test_judges_and_figures_share_one_copy_of_an_encoder(tmp_path, monkeypatch):
    shape = dict(vocab=270, width=8, depth=1, heads=2, head_dim=4, mlp_width=16, context=32, position_rows=32, types=2)
    encoder, folder = Encoder(**shape, head="tanh"), tmp_path / "encoder"
    hf.save(folder, encoder, encoder.init(jax.random.key(0)))
    train_bpe(["the food"], 270).save(folder)
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fast))
    read, real = [], embed.load_text_encoder
    monkeypatch.setattr(embed, "load_text_encoder", lambda *a, **k: read.append(a) or real(*a, **k))
    session = Session(tmp_path / "root")
    data = stage(session, labelled)
    judge = {"kind": "probe", "encoder": str(folder)}
    first, second = (stage(session, judges.fit_judge, judge | {"name": n}, data=data) for n in ("one", "two"))
    one, two = judges.open_judge(first).embed, judges.open_judge(second).embed
    third = embed.open_embedder(session, folder, batch=64)
    assert len(read) == 1 and one.params is two.params is third.params and (one.batch, third.batch) == (32, 64)
    with layout.laid_out(layout.read("data=2")):
        assert embed.open_embedder(session, folder).params is not one.params
    hf.save(folder, encoder, encoder.init(jax.random.key(1)))  # an edited encoder is another one
    assert embed.open_embedder(session, folder).version != one.version


def labelled(run):
    write_jsonl(run.path / "data.jsonl", [{"text": t, "label": i % 2} for i, t in enumerate(("the", "food") * 2)])


def test_another_layout_is_another_opening(source, tmp_path):
    lm = stage(Session(tmp_path), sources.load_lm, {"source": source})
    alone = open_lm(lm)[1]
    with layout.laid_out(layout.read("fsdp=4,tensor=2")):
        split = open_lm(lm)[1]
        assert open_lm(lm)[1] is split
    assert len(jax.tree.leaves(split)[0].sharding.device_set) == 8 and open_lm(lm)[1] is alone


def test_the_least_recently_used_is_given_up(tmp_path):
    session, made = Session(tmp_path), []
    for key in (1, 2, 1, 3, 1, 2):
        session.keep("number", key, lambda key=key: made.append(key) or key, most=2)
    assert made == [1, 2, 3, 2]


def test_weights_are_hashed_once(source, tmp_path, monkeypatch):
    hashed, real = [], io.sha256
    monkeypatch.setattr(io, "_SETTLED", -1)
    monkeypatch.setattr(io, "sha256", lambda file: hashed.append(file.name) or real(file))
    session = Session(tmp_path)
    open_lm(stage(session, sources.load_lm, {"source": source}))
    open_lm(stage(session, sources.load_lm, {"source": source, "dtype": "bfloat16"}))
    assert hashed.count("model.safetensors") == 1


def test_a_judge_is_opened_once(tmp_path):
    session = Session(tmp_path)
    judge = stage(session, judges.fit_judge, {"kind": "diversity", "name": "distinct"})
    again = stage(session, judges.fit_judge, {"kind": "diversity", "name": "distinct"})
    assert judges.open_judge(judge) is judges.open_judge(again)


def test_a_plan_runs_nothing_and_leaves_the_session_alone(tmp_path):
    session = Session(tmp_path)
    first = stage(session, figure)
    plan = session.dry_run()
    assert stage(plan, figure).metrics() == [{"x": 1}] and plan.tally.reused == [first.path.name]
    later = stage(plan, figure, {"x": 2}, before=stage(plan, figure))
    assert list(plan.pending) == [later.path.name] and not later.path.exists()
    with pytest.raises(UnfinishedError):
        later.metrics()
    assert session.tally.executed == [first.path.name] and session.pending is None
    assert stage(session, figure, {"x": 2}, before=first) == later


def test_a_stage_computes_in_the_layout_of_its_session(tmp_path):
    def look(run):
        run.log(sharded=layout.current().sharded)

    found = stage(Session(tmp_path, layout=layout.read("fsdp=8")), look)
    assert found.metrics() == [{"sharded": True}] and not layout.current().sharded


def test_an_artifact_without_a_session_has_one_of_its_own(tmp_path):
    artifact = Artifact(stage(tmp_path, figure).path, "")
    assert artifact.session is artifact.session and artifact.session.root == tmp_path
