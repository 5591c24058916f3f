"""Rewards that ask something else of each prompt: instructions that code verifies, keywords, slots, by hand; the
strength that is chosen on one half of the prompts and scored on the other."""

import json

import numpy as np
import pytest

from ctg_jax import evaluation, rewards
from ctg_jax.data import load, requests
from ctg_jax.evaluation import held_out
from ctg_jax.rewards import instructions, keywords, slots
from ctg_jax.rewards.instructions import CHECKS, follows
from ctg_jax.run.stage import stage
from ctg_jax.stages import judges, sources
from ctg_jax.stages.factors import factor
from ctg_jax.types import InputError

BY_HAND = [  # instruction, arguments, a text that follows it, one that does not
    ("keywords:existence", dict(keywords=["sun", "Moon"]), "The moon and the sun.", "The moon."),
    ("keywords:frequency", dict(keyword="go", frequency=2, relation="at least"), "Go, go!", "Go on."),
    ("keywords:frequency", dict(keyword="go", frequency=2, relation="less than"), "Go on.", "Go, go!"),
    ("keywords:forbidden_words", dict(forbidden_words=["rain"]), "A train.", "No Rain."),
    ("keywords:letter_frequency", dict(letter="e", let_frequency=3, let_relation="at least"), "Eel sees", "eel"),
    ("length_constraints:number_words", dict(num_words=4, relation="less than"), "one two, three", "a b c d"),
    ("length_constraints:number_sentences", dict(num_sentences=3, relation="at least"), "A! B? C", "A. B..."),
    ("length_constraints:number_paragraphs", dict(num_paragraphs=2), "a\n***\nb", "a\n***\n***\nb"),
    ("length_constraints:nth_paragraph_first_word", dict(num_paragraphs=2, nth_paragraph=2, first_word="so"),
     "First.\n\n\"So, second.", "So.\n\nFirst."),
    ("detectable_content:postscript", dict(postscript_marker="P.S."), "Bye. P. S. more", "Bye. ps"),
    ("detectable_content:postscript", dict(postscript_marker="P.P.S"), "Bye. P.P.S more", "Bye. P.S. more"),
    ("detectable_content:number_placeholders", dict(num_placeholders=2), "[name] at [place]", "[name]"),
    ("detectable_format:number_bullet_lists", dict(num_bullets=2), "* one\n- two", "* one\n**two**"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "Well, my answer is no."),
    ("detectable_format:number_highlighted_sections", dict(num_highlights=2), "*a* and *b*", "*a* and b"),
    ("detectable_format:multiple_sections", dict(section_spliter="Part", num_sections=2), "Part 1 a Part 2 b",
     "Part 1 a"),
    ("detectable_format:json_format", {}, "```json\n{\"a\": 1}\n```", "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\nText", "<< >>"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("combination:repeat_prompt", dict(prompt_to_repeat="Say it. "), "say it. Done", "Done. say it."),
    ("startend:end_checker", dict(end_phrase="The end."), "It is\nthe end. ", "The end. Not"),
    ("startend:quotation", {}, ' "all of it" ', '"some" of it'),
    ("change_case:capital_word_frequency", dict(capital_frequency=2, capital_relation="less than"), "One BIG dog",
     "TWO BIG dogs"),
    ("change_case:english_capital", {}, "ALL, 1", "All"),
    ("change_case:english_lowercase", {}, "all, 1", "All"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]  # fmt: skip


@pytest.mark.parametrize("name, given, good, bad", BY_HAND, ids=[f"{i}-{row[0]}" for i, row in enumerate(BY_HAND)])
def test_each_instruction_by_hand(name, given, good, bad):
    assert follows(good, name, given) and not follows(bad, name, given)
    assert not follows("  ", name, given)


def test_every_instruction_is_tested_and_the_loose_criterion_cuts_lines_and_asterisks():
    assert {row[0] for row in BY_HAND} == set(CHECKS)
    name, given = "length_constraints:number_words", dict(num_words=3, relation="less than")
    text = "Sure, here it is:\nshort text"
    assert not follows(text, name, given) and follows(text, name, given, loose=True)
    assert follows("*all lower*", "change_case:english_lowercase", loose=True)
    assert instructions.variants("a\n*b*\nc") == [
        "a\n*b*\nc",
        "a\nb\nc",
        "*b*\nc",
        "b\nc",
        "a\n*b*",
        "a\nb",
        "*b*",
        "b",
    ]
    with pytest.raises(
        InputError, match="the instruction 'keyword:existence' is unknown; did you mean 'keywords:exist"
    ):
        follows("a", "keyword:existence")
    with pytest.raises(InputError, match=r"has the arguments \['words'\], expected \['num_words', 'relation'\]"):
        follows("a", name, dict(words=3))
    with pytest.raises(InputError, match="relation is 'more than', expected 'less than' or 'at least'"):
        follows("a", name, dict(num_words=3, relation="more than"))


@pytest.mark.parametrize(
    "name, given, words",
    [
        ("keywords:existence", dict(keywords="sun"), "keywords is 'sun', expected a list of strings"),
        ("keywords:forbidden_words", dict(forbidden_words=["sun", 3]), r"is \['sun', 3\], expected a list"),
        ("keywords:letter_frequency", dict(letter="", let_frequency=2, let_relation="at least"), "letter is '', exp"),
        ("length_constraints:number_words", dict(num_words="9", relation="at least"), "num_words is '9', exp"),
        ("length_constraints:number_paragraphs", dict(num_paragraphs=1.5), "num_paragraphs is 1.5, expected a whole"),
        ("length_constraints:nth_paragraph_first_word", dict(num_paragraphs=2, nth_paragraph=0, first_word="so"),
         "nth_paragraph is 0, expected at least 1"),
        (["keywords:existence"], {}, "is unknown"),
    ],
)  # fmt: skip
def test_arguments_of_the_wrong_type_are_refused_when_the_judge_is_made(name, given, words):
    record = dict(prompt="a", instruction_id_list=[name], kwargs=[given])
    with pytest.raises(InputError, match=f"record 1 of the file: .*{words}"):
        instructions.fit([record], dict(name="x", target=1), "the file")


def test_whole_numbers_may_be_floats_and_arguments_must_be_by_name():
    given = dict(num_paragraphs=2.0, nth_paragraph=2.0, first_word="so")
    assert follows("First.\n\nSo, second.", "length_constraints:nth_paragraph_first_word", given)
    with pytest.raises(InputError, match="record 1 of the file has 'none' in kwargs, expected the arguments of an"):
        record = dict(prompt="a", instruction_id_list=["punctuation:no_comma"], kwargs=["none"])
        instructions.fit([record], dict(name="x", target=1), "the file")


RECORDS = [
    dict(prompt="Write a poem without commas, in at most two words.", instruction_id_list=["punctuation:no_comma",
         "length_constraints:number_words"], kwargs=[{}, {"num_words": 3, "relation": "less than", "keyword": None}]),
    dict(prompt="Shout.", instruction_id_list=["change_case:english_capital", "language:response_language"],
         kwargs=[{}, {"language": "de"}]),
    dict(prompt="Auf Deutsch.", instruction_id_list=["language:response_language"], kwargs=[{"language": "de"}]),
]  # fmt: skip


def test_bundled_instructions_can_all_be_checked_and_are_the_same_every_time():
    source = load("bundled:instructions", "test[:50]", text="prompt")
    assert len(source) == 50 and source[0]["text"] == requests.records("test")[0]["prompt"]
    names = {name for split in requests.SPLITS for r in requests.records(split) for name in r["instruction_id_list"]}
    assert len(names) == 12 and names < set(CHECKS)
    judge = instructions.fit(list(source), dict(name="follows", target=1), "the bundled ones")
    scores = judge([r["prompt"] for r in source], ["warm, friend"] * 50)
    assert len(np.unique(scores)) >= 3
    assert requests.records("train")[0] != requests.records("test")[0]
    with pytest.raises(InputError, match="split 'dev' of bundled:instructions is unknown: use one of train, valid"):
        load("bundled:instructions", "dev")


def test_the_fingerprint_of_bundled_instructions_is_that_of_their_records(monkeypatch):
    before = requests.digest_of()
    assert before == requests.digest_of()
    monkeypatch.setattr(requests, "_record", lambda generator: {"prompt": "a"})
    assert requests.digest_of() != before


def stored(folder, rows):
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return stage(folder, sources.load_data, dict(source=f"jsonl:{path}", split="all", text="prompt"))


def test_a_judge_of_instructions_is_found_by_its_file_and_reads_the_records_of_the_prompts(tmp_path, caplog):
    assert {"instructions", "keywords", "slots"} <= set(rewards.kinds())
    data = stored(tmp_path, RECORDS)
    judge = judges.open_judge(stage(tmp_path, judges.fit_judge, dict(kind="instructions"), data=data))
    loose = judges.open_judge(stage(tmp_path, judges.fit_judge, dict(kind="instructions", target="loose"), data=data))
    assert "2 records ask for a language, which is not checked" in caplog.text
    prompts = [RECORDS[0]["prompt"]] * 3 + ["Shout."] * 2
    texts = ["so few", "few, so few", "few, so", "LOUD", "*LOUD* \nbut not here"]
    assert judge(prompts, texts).tolist() == [1, 0, 0.5, 1, 0]
    assert loose(prompts, texts).tolist() == [1, 0, 0.5, 1, 1]
    assert judge.threshold == 1 and judge.version != loose.version
    with pytest.raises(
        InputError, match=r"the prompt 'Auf Deutsch.' is not among the records that the judge 'positive'"
    ):
        judge(["Auf Deutsch."], ["ja"])
    with pytest.raises(InputError, match="the prompt '' is not among the records"):
        judge([""], ["ja"])
    with pytest.raises(InputError, match="target is 'lose', expected 'strict' or 'loose'"):
        stage(tmp_path, judges.fit_judge, dict(kind="instructions", target="lose"), data=data)
    with pytest.raises(InputError, match="a judge of kind 'instructions' is fitted on data, and no data were given"):
        stage(tmp_path, judges.fit_judge, dict(kind="instructions"))
    for row, words in [
        (dict(prompt="a"), "has instruction_id_list None and kwargs None: expected two lists of one length"),
        (
            dict(prompt="a", instruction_id_list=["punctuation:comma"], kwargs=[{}]),
            "record 1 of .* is unknown; did you",
        ),
        (RECORDS[2], "no record of .* asks for anything that this judge can check"),
    ]:
        with pytest.raises(InputError, match=words):
            instructions.fit([row], dict(name="x", target=1), "the file")


def test_keywords_by_hand_with_stems(tmp_path):
    rows = [
        dict(prompt="field look stand =", keywords=["field", "look", "stand"], text="a"),
        dict(prompt="b =", text="b"),
    ]
    judge = keywords.fit(rows, dict(name="covered"), "the file")
    found = judge(["field look stand ="] * 3, [" He stands looking over fields.", " A field.", ""])
    np.testing.assert_allclose(found, [1, 1 / 3, 0], atol=1e-6)
    judge.save(tmp_path)
    assert keywords.load(tmp_path, dict(name="covered")).version == judge.version
    for wrong in ("field", 5, {"field": 1}, ["field", ""], ["..."]):
        with pytest.raises(
            InputError, match=r"record 1 of the file has the keywords .*, expected a list of strings with"
        ):
            keywords.fit([dict(prompt="a", keywords=wrong)], dict(name="x"), "the file")
    twice = [dict(prompt="a", keywords=["b"]), dict(prompt="a", keywords=["c"])]
    with pytest.raises(InputError, match=r"asks \['c'\] of the prompt 'a' and another one \['b'\]"):
        keywords.fit(twice, dict(name="x"), "the file")


E2E = "name[Blue Spice], eatType[coffee shop], customer rating[5 out of 5], priceRange[£20-25], familyFriendly[no] ="


@pytest.mark.parametrize(
    "text, share",
    [
        (" Blue Spice is a coffee shop with five stars for 20 to 25 pounds. It is not family-friendly.", 1.0),
        (" Blue Spice, adults only.", 2 / 5),
        (" Blue Spice is family friendly.", 1 / 5),  # the opposite is no realisation
        (" A Coffee Shop for £20-25, rated 5 out of 5.", 3 / 5),
        (" The Blue Spices.", 0.0),
    ],
)
def test_slots_by_hand(text, share):
    assert slots.Slots()([E2E], [text])[0] == pytest.approx(share)


@pytest.mark.parametrize(
    "name, value, text, found",
    [
        ("customer rating", "high", "A cafe with high prices.", False),
        ("customer rating", "low", "It is low-priced.", False),
        ("customer rating", "1 out of 5", "Its price range is low.", False),
        ("customer rating", "high", "Prices are high, as is the customer rating: high.", True),
        ("customer rating", "average", "It has an average rating and high prices.", True),
        ("customer rating", "high", "A £20-25 price range and high costumer rating.", True),
        ("priceRange", "high", "It has a high customer rating.", False),
        ("priceRange", "high", "It is rated low, at high prices.", True),
        ("priceRange", "moderate", "A moderate price range, rated high.", True),
        ("priceRange", "cheap", "It has low prices and a poor rating.", True),
    ],
)
def test_a_rating_is_no_price(name, value, text, found):
    assert slots.realised(name, value, text) == found


@pytest.mark.parametrize(
    "text, friendly",
    [
        ("It is not far from the river, and family friendly.", True),
        ("It is not expensive and kid friendly.", True),
        ("A family-friendly pub, not far from the river.", True),
        ("A family friendly place that is not expensive.", True),
        ("It is not only family friendly but cheap.", True),
        ("It is not a very kid friendly place.", False),
        ("It isn't family-friendly.", False),
        ("This non-family-friendly pub is cheap.", False),
        ("There is no room for children.", False),
        ("It is a non- child friendly pub, so no, don't bring your kids.", False),
        ("Children are not allowed.", False),
        ("Kids aren't welcome.", False),
    ],
)
def test_a_denial_must_be_about_families(text, friendly):
    found = [slots.realised("familyFriendly", value, text) for value in ("yes", "no")]
    assert found == [friendly, not friendly]


def test_slots_of_both_syntaxes_and_prompts_without_any():
    assert slots.slots(E2E)[2] == ("rating", "5 out of 5")
    other = "name : Blue Spice | price : less than £ 20 | family friendly : yes ="
    assert slots.slots(other) == [("name", "Blue Spice"), ("price", "less than £ 20"), ("family friendly", "yes")]
    assert slots.Slots()([other], ["Blue Spice is cheap and kid friendly"])[0] == 1
    with pytest.raises(InputError, match="the prompt 'what to eat' holds no slots for the judge 'slots'"):
        slots.Slots()(["what to eat"], ["soup"])


def test_a_harmonic_mean_has_no_score_that_makes_up_for_another():
    np.testing.assert_allclose(evaluation.harmonic([[2, 2, 1, 0], [2, 1, 1, 2], [2, 2, 2, 2]]), [2, 1.5, 1.2, 0])


def test_the_strength_is_chosen_on_one_half_and_scored_on_the_other():
    """Whichever two of the four prompts choose, strength 2 has the higher mean there; that of prompt d is lower, which
    is either among those that choose or among those that are scored."""
    prompts = ["a", "b", "c", "d"] * 2
    concept = [0.5] * 4 + [1, 1, 1, 0.5]
    fluent = [0.5] * 4 + [1, 1, 1, 0.5]
    for seed in range(4):
        found = held_out([1] * 4 + [2] * 4, prompts, {"concept": concept, "fluent": fluent}, seed=seed)
        chosen_on_d = found.curve[2.0] < 1
        assert found.strength == 2 and found.curve[1.0] == 0.5
        assert found.figures["overall"].value == pytest.approx(1 if chosen_on_d else 0.75)
        assert found.figures["concept"].n == 2
    tie = held_out([-1, -1, 0, 0], ["a", "b"] * 2, {"concept": [0.5] * 4})
    assert tie.strength == 0
    for given, words in [
        (([1, 2], ["a", "a"], {"x": [1, 1]}), "there are 2 strengths and 1 prompts, expected at least 2 of each"),
        (([1, 2, 2], ["a", "a", "b"], {"x": [1, 1, 1]}), "prompt 'b' has no sample at strength 1"),
        (([1, 1, 2, 2], ["a", "b"] * 2, {"x": [1, 1, 1, -1]}), "the score 'x' is negative or not finite"),
        (([1, 1, 2, 2], ["a", "b"] * 2, {"overall": [1] * 4}), "a score is called 'overall'"),
        (([1, 2], ["a", "b"], {}), r"there are 2 strengths, 2 prompt_ids and scores \{\}"),
    ]:
        with pytest.raises(InputError, match=words):
            held_out(*given)


class Scored:
    """An evaluation with these rows."""

    def __init__(self, rows):
        self.kept = rows

    def rows(self, name):
        return self.kept


def test_the_stage_reads_judges_relevance_and_fluency(tmp_path):
    logged, recorded = {}, {}

    class Run:
        def log(self, name, **figure):
            logged[name] = figure["value"]

        def record(self, **facts):
            recorded.update(facts)

    def rows(concept, nats):
        return Scored([
            {"prompt_id": i, "scores": {"concept": concept}, "relevance": -0.1 if concept == 1 else 0.5, "nats": nats,
             "read": 2}
            for i in range(4)
        ])  # fmt: skip

    parts = dict(figures=[rows(0.5, 4.0), rows(1.0, 8.0)], strengths=[1, 2])
    factor(Run(), **parts, scores=["concept"], fluent=3.0)
    low, high = 2 / (1 / 0.5 + 1), 2 / (1 + np.e)
    assert recorded["strength"] == 1 and dict(map(tuple, recorded["curve"])) == pytest.approx({1: low, 2: high})
    assert logged == pytest.approx({"overall": low, "concept": 0.5, "fluency": 1.0})
    with pytest.raises(InputError, match="the evaluations have no score 'concepts'; did you mean 'concept'"):
        factor(Run(), **parts, scores=["concepts"])
    with pytest.raises(InputError, match="3 strengths were given for 2 evaluations"):
        factor(Run(), figures=parts["figures"], strengths=[1, 2, 3], scores=["concept"])
    more = [
        Scored([{**row, "scores": {"concept": 1.5, "fluency": 0.5}} for row in part.kept]) for part in parts["figures"]
    ]
    with pytest.raises(InputError, match=r"the score 'concept' reaches 1\.5, expected scores from 0 to 1"):
        factor(Run(), figures=more, strengths=[1, 2], scores=["concept"])
    with pytest.raises(InputError, match="fluent is given, but a judge is called 'fluency' too"):
        factor(Run(), figures=more, strengths=[1, 2], scores=["fluency"], fluent=3.0)
    factor(Run(), **parts, scores=["relevance"])
    assert logged["relevance"] == 0.5 and recorded["strength"] == 1
    empty = [Scored([row | {"relevance": None} for row in part.kept]) for part in parts["figures"]]
    factor(Run(), figures=empty, strengths=[1, 2], scores=["relevance"])
    assert logged["overall"] == logged["relevance"] == 0
    without = [Scored([{k: v for k, v in row.items() if k != "relevance"} for row in part.kept]) for part in empty]
    with pytest.raises(InputError, match="the evaluations have no score 'relevance'; it has concept"):
        factor(Run(), figures=without, strengths=[1, 2], scores=["relevance"])
