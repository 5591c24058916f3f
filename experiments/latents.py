"""Latents of sentences: recovery by steering vectors, transfer of sentiment, similarity, an analysis of the vectors;
and the continuations that a language model writes from the latent of a sentence encoder.

    python experiments/latents.py --config=configs/latents.py:tiny [--sections=recovery,transfer] [--root=runs]

Each section of the configuration is a report of its own under ROOT/reports; their paths are printed last. Cells of the
recovery grid, strengths and counts are stages: finished ones are not run again, and an interrupted search continues
where it stopped.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from ctg_jax import report
from ctg_jax.learn import embeddings
from ctg_jax.mesh import processes
from ctg_jax.methods import dglm, latent_steer
from ctg_jax.report import pictures
from ctg_jax.run.stage import Artifact, nearest, stage
from ctg_jax.stages import sources
from ctg_jax.studies import label_transfer, latents, reconstruct, sentence_pairs
from ctg_jax.types import InputError
from experiments import cli, inputs, reporting, roots


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of a configuration: the root and the LM of its stages, and its settings."""

    root: str
    lm: Artifact
    spec: str
    name: str
    settings: dict

    def page(self, made, rows, draw=None, **facts):
        """Writes the report of `rows`, of which `made` are the artifacts, and the pictures that `draw(folder)` adds;
        the first process writes them. Each set of settings and artifacts has a folder of its own."""
        if not processes.first():
            return None
        ids = [a.id for a in made]
        folder = reporting.folder_of(self.root, self.spec, self.name, self.settings, self.lm.id, ids) / self.name
        about = {"configuration": self.spec, "section": self.name, "settings": json.dumps(self.settings)}
        about["language model"] = self.lm.path.name
        about |= {a.path.name: reporting.provenance(self.root, a) for a in dict.fromkeys(made)}
        found = report.write(folder, rows, about=about | {"ctg_jax": reporting.version()}, **facts)
        if draw is not None:
            draw(folder)
        roots.keep_files(self.root, folder)
        return found


def vectors_of(root, lm, settings, fit):
    """(sentences, their vectors); `random_words` in the settings of the sentences is the seed of
    `latents.random_words`."""
    settings = dict(settings)
    seed = settings.pop("random_words", None)
    data = stage(root, sources.load_data, settings)
    if seed is not None:
        data = stage(root, latents.random_words, {"seed": seed}, data=data)
    return data, latent_steer.fit(root, lm=lm, data=data, **fit)


def recovery(section):
    """Every cell of the grid: sites × positions × dimensions × sets of sentences."""
    root, lm, settings = section.root, section.lm, section.settings
    grid = settings["grid"]
    rows, cells, made = [], [], []
    for values in itertools.product(*grid.values()):
        cell = dict(zip(grid, values))
        for domain, data in settings["data"].items():
            sentences, vectors = vectors_of(root, lm, data, {**settings["fit"], **cell})
            figures = stage(root, latents.recover, {}, lm=lm, data=sentences, vectors=vectors)
            made.append(figures)
            columns = {**cell, "domain": domain}
            rows.append(report.row(figures, figures, method="latent_steer", **columns))
            cells.append({**columns, **{k: f.value for k, f in rows[-1]["figures"].items()}})
    several = len(grid.get("site", ())) > 1

    def draw(folder):
        pictures.heat_map(folder / "recovery.png", cells, "site", "positions", "BLEU-4")

    return section.page(made, rows, draw if several else None, title="Recovery of sentences from a frozen LM")


def transfer(section):
    """Every strength and number of vectors of unsupervised sentiment transfer."""
    root, lm, settings = section.root, section.lm, section.settings
    train, train_vectors = vectors_of(root, lm, settings["train"], settings["fit"])
    data, vectors = vectors_of(root, lm, settings["data"], settings["fit"])
    judge = inputs.judge(root, "positive", settings["judge"])
    given = dict(lm=lm, train=train, train_vectors=train_vectors, data=data, vectors=vectors, judge=judge)
    rows, made = [], []
    for count, strength in itertools.product(settings["counts"], settings["strengths"]):
        done = stage(root, label_transfer.transfer, dict(strength=strength, count=count), **given)
        made.append(done)
        rows.append(report.row(done, done, method="latent_steer", strength=strength, vectors=count))
    way = dict(lm=lm, train=train, vectors=train_vectors)
    control = stage(root, label_transfer.direction, dict(count=max(settings["counts"])), **way)
    if processes.first():
        print(f"the direction as a control, for experiments/generate.py: {control.path}")

    def draw(folder):
        pictures.curves(folder / "transfer.png", rows, "self-BLEU", "transfer accuracy", "vectors", "strength")

    title = "Sentiment transfer by vector arithmetic"
    return section.page([*made, control], rows, draw, title=title, scorers=done.spec["judges"])


def similarity(section):
    """Spearman's ρ with human scores on pairs of sentences."""
    root, lm, settings = section.root, section.lm, section.settings
    sentences = stage(root, sentence_pairs.sentences_of_pairs, settings["pairs"])
    rows, made = [], []
    for name, fit in settings["fits"].items():
        vectors = latent_steer.fit(root, lm=lm, data=sentences, **fit)
        done = stage(
            root, sentence_pairs.similarity, {"encoder": settings["encoder"]}, lm=lm, pairs=sentences, vectors=vectors
        )
        made.append(done)
        for figure, value in report.row(done)["figures"].items():
            own = figure in ("z", "z centred")  # the others are the same whatever was fitted
            if own or not any(r["method"] == figure for r in rows):
                label = f"{figure}, {name}" if own else figure
                rows.append({"method": label, "figures": {"100 Spearman's ρ": value}, "samples": []})
    return section.page(made, rows, title="Cosine of latent vectors and human similarity")


def analysis(section):
    """Interpolation, random vectors, neighbours, principal components."""
    root, lm, settings = section.root, section.lm, section.settings
    data, vectors = vectors_of(root, lm, settings["data"], settings["fit"])
    done = stage(root, latents.analyse, settings["options"], lm=lm, data=data, vectors=vectors)
    points = done.rows("principal.jsonl")

    def draw(folder):
        pictures.scatter(folder / "principal.png", points, "first component", "second component")

    rows = [report.row(done, done, method="latent_steer")]
    return section.page([done], rows, draw, title="A look at latent vectors")


def reconstruction(section):
    """Continuations of held-out texts from the true latent, from that of another text and from none.

    `cuts` of the settings says where texts are cut into prefix and continuation: a name -> the words of the prefix, or
    None for the cut of training.
    """
    root, lm, settings = section.root, section.lm, section.settings
    data = stage(root, sources.load_data, settings["train"])
    control = dglm.fit(root, lm=lm, data=data, **settings["fit"])
    held = stage(root, sources.load_data, settings["data"])
    rows, made = [], []
    for cut, words in settings.get("cuts", {"as in training": None}).items():
        encode = settings["fit"].get("encode", {}) | (dict(words=words) if words else {})
        latents = stage(root, embeddings.encode, encode, lm=lm, data=held)
        for latent in reconstruct.LATENTS:
            options = {**settings["options"], "latent": latent}
            done = stage(root, reconstruct.reconstruct, options, lm=lm, control=control, latents=latents)
            made.append(done)
            rows.append(report.row(done, done, method="dglm", latent=latent, cut=cut))
    return section.page(made, rows, title="Continuations from the latent of the true one")


SECTIONS = dict(
    recovery=recovery, transfer=transfer, similarity=similarity, analysis=analysis, reconstruction=reconstruction
)


def main(argv, session):
    def define(fv):
        cli.config_flag(fv, argv)
        flags.DEFINE_list("sections", [], f"which of {', '.join(SECTIONS)}; all by default", flag_values=fv)

    values, _ = cli.parse(argv, define, __doc__)
    config = cli.chosen(values).to_dict()
    present = [name for name in SECTIONS if name in config]
    for name in values.sections:
        if name not in present:
            raise InputError(f"--sections names {name!r}, which the configuration lacks{nearest(name, present)}")
    if not present:
        raise InputError(f"the configuration has none of the sections {', '.join(SECTIONS)}: use another script")
    lm = inputs.language_model(session, config["lm"])
    spec = cli.spec_of(argv)
    chosen = values.sections or present
    pages = [SECTIONS[name](Section(session, lm, spec, name, config[name])) for name in chosen]
    return "\n".join(map(str, pages)) if processes.first() else None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
