"""The bundled grammar: attributes are exact, texts are many, and prompts say nothing."""

import itertools
import re
from collections import Counter

import pytest

from ctg_jax.data import grammar, reviews
from ctg_jax.types import InputError

ATTRIBUTES = ("label", "topic", "toxic", "length", "formal")


@pytest.fixture(scope="module")
def corpus():
    return [reviews.generate(i, seed=3) for i in range(6000)]


def test_oracle_reads_every_attribute_back(corpus):
    wrong = [r for r in corpus if reviews.oracle(r["text"]) != {a: r[a] for a in ATTRIBUTES}]
    assert not wrong


def test_oracle_covers_every_cell():
    for label, topic, toxic, length, formal in itertools.product(range(2), range(8), range(2), range(3), range(2)):
        want = {"label": label, "topic": topic, "toxic": toxic, "length": length, "formal": formal}
        for i in range(3):
            made = reviews.generate(i, seed=5, **want)
            assert {a: made[a] for a in ATTRIBUTES} == want
            assert reviews.oracle(made["text"]) == want, made["text"]


def test_attributes_are_balanced_and_independent(corpus):
    n = len(corpus)
    for name, size in (("label", 2), ("topic", 8), ("length", 3), ("formal", 2)):
        shares = Counter(r[name] for r in corpus)
        assert set(shares) == set(range(size))
        assert all(abs(c / n - 1 / size) < 0.03 for c in shares.values())
    toxic = Counter((r["toxic"], r["label"]) for r in corpus)
    assert abs(toxic[1, 0] / n - 0.1) < 0.02
    assert abs(toxic[1, 1] / n - 0.1) < 0.02


def test_random_access(corpus):
    assert reviews.generate(17, seed=3) == corpus[17]
    assert reviews.generate(17, seed=4)["text"] != corpus[17]["text"]


def test_a_corpus_has_no_duplicates(corpus):
    assert len({r["text"] for r in corpus}) == len(corpus)


def test_vocabulary():
    assert len(reviews.vocabulary()) >= 600


def test_written_words_are_in_the_vocabulary(corpus):
    seen = {w for r in corpus for w in reviews.words(r["text"]) if w[0].isalpha()}
    assert seen <= reviews.vocabulary()
    assert len(seen) >= 600


def test_count_of_reviews():
    assert reviews.count_reviews() >= 10**9


def test_count_agrees_with_enumeration_on_a_small_grammar():
    """A grammar cut down to two aspects, two details and one opening, every review of one skeleton listed."""
    cell = reviews._Cell(1, 0, 1)
    table = {"adj": ["good", "kind"], "x": ["ham", "jam", "tea"]}
    cell.opening, cell.detail = [("On {x}, we met.", table)], [("I had {x}.", table), ("It rained.", table)]
    cell.first = [[("The {adj} cook.", table)], [("A {x} and {x}.", table), ("Wow, a {x}.", table)]]
    cell.body = [cell.first[0] + [("The cook.", table)], cell.first[1]]
    seen, draws = set(), grammar.Draws("listing")
    for _ in range(30000):
        seen.add(" ".join(cell.write("OBDB", draws)))
    # openings 3, details 3 + 1, bodies: first of aspect 0 (2) then 1 (9), or first of 1 (9) then 0 (3)
    assert cell.count("OBDB") == len(seen) == 3 * 4 * (2 * 9 + 9 * 3)


def test_ordered_choices_by_hand():
    # two groups of 2 and 3 sentences, one of 4: ordered pairs from different groups = 2 * (2*3 + 2*4 + 3*4) = 52
    assert grammar.ordered([2, 3, 4], 2) == 52
    assert grammar.ordered([2, 3, 4], 0) == 1
    assert grammar.ordered([2, 3], 3) == 0


@pytest.mark.parametrize("label, topic, formal", [(0, 0, 0), (1, 4, 1), (1, 7, 0)])
def test_every_kind_of_sentence_is_unambiguous_and_disjoint(label, topic, formal):
    """With this, counting ways to write a review counts distinct reviews."""
    seen = set()
    for kind in ("detail", "closing", "insult", "body"):
        listed = reviews.cell(label, topic, formal).sentences(kind)
        assert len(listed) == len(set(listed)), kind
        assert seen.isdisjoint(listed), kind
        seen |= set(listed)
        assert all(re.fullmatch(r"[A-Z][^.!?]*[.!?]", s) for s in listed), kind
    template, table = reviews.cell(label, topic, formal).opening[0]
    openings = list(grammar.enumerate_all(template, table))
    assert len(openings) == len(set(openings)) == grammar.count(template, table)


def test_prompts_are_openings_without_any_cue(corpus):
    for r in corpus[:1000]:
        assert r["text"].startswith(r["prompt"] + " ")
        assert set(reviews.count_cues(r["prompt"]).values()) == {0}
        assert 3 <= len(r["prompt"].split()) <= 11


def test_cue_sets_do_not_overlap():
    cues = reviews.cue_words()
    groups = [cues[n] for n in ("positive", "negative", "insult", "formal", "informal", *reviews.TOPICS)]
    assert all(groups)
    for a, b in itertools.combinations(groups, 2):
        assert a.isdisjoint(b), a & b


@pytest.mark.parametrize(
    "text, label, score",
    [
        ("The soup was delicious.", 1, 0.75),
        ("The soup was not delicious.", 0, 0.25),
        ("the waiter was n't rude at all", 1, 0.75),
        ("not bland but delicious", 1, 2.5 / 3),
        ("the soup was bland , the waiter polite", None, 0.5),
        ("", None, 0.5),
        ("xyzzy plugh", None, 0.5),
    ],
)
def test_scores_of_imperfect_text(text, label, score):
    assert reviews.oracle(text)["label"] == label
    assert reviews.sentiment_score(text) == pytest.approx(score)


def test_oracle_without_cues_says_none():
    assert reviews.oracle("hello there") == {"label": None, "topic": None, "toxic": 0, "length": 0, "formal": None}


def test_grammar_notation():
    table = {"x": ["apple", "pear"]}
    assert sorted(grammar.enumerate_all("a(n) {x} or {x}.", table)) == ["A pear or apple.", "An apple or pear."]
    assert grammar.count("a(n) {x} or {x}.", table) == 2


@pytest.mark.parametrize("bad", [{"colour": 1}, {"label": 2}])
def test_bad_attribute(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        reviews.generate(0, **bad)


def test_known_review():
    """The corpus is part of the interface: a change of grammar must be deliberate."""
    assert reviews.generate(0, 0)["text"] == (
        "Last month, my brother and I used a guest pass at the crossfit gym on River Road. "
        "The locker room was conspicuously spotless. "
        "The showers were spotless. "
        "There are eight benches beside the mirrors. "
        "By no means unfair, the enrollment fee was, to be precise, generous. "
        "Accordingly, I shall joyfully tell my coworkers about it."
    )
