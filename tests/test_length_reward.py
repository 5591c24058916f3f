"""The length reward: every request and its score by hand, requests in prompts, bad input."""

import math

import pytest

from ctg_jax import rewards
from ctg_jax.rewards.length import Length, asked
from ctg_jax.types import InputError


@pytest.mark.parametrize(
    "request_, wanted",
    [
        ("12 words", (12, 12, "word")),
        ("Write exactly 1 word:", (1, 1, "word")),
        ("equal to 7 words", (7, 7, "word")),
        ("at most 40 characters", (0, 40, "character")),
        ("less than 9 words", (0, 9, "word")),
        ("More than 3 words", (3, math.inf, "word")),
        ("at least 3 words", (3, math.inf, "word")),
        ("between 5 and 9 words", (5, 9, "word")),
        ("at most 3 words, no: at least 5 words", (5, math.inf, "word")),
        ("the 12 monkeys", None),
    ],
)
def test_requests_by_hand(request_, wanted):
    assert asked(request_) == wanted


def test_scores_are_minus_the_distance():
    texts = ["a b c", "a b c d e f g"]
    assert Length("5 words")(["", ""], texts).tolist() == [-2, -2]
    assert Length("between 4 and 6 words")(["", ""], texts).tolist() == [-1, -1]
    assert Length("at most 4 words")(["", ""], texts).tolist() == [0, -3]
    assert Length("at least 4 characters")(["", ""], texts).tolist() == [0, 0]
    own = Length()(["3 words: ", "between 1 and 5 words: "], texts)
    assert own.tolist() == [0, -2] and (own >= Length.threshold).tolist() == [True, False]


def test_what_is_wrong_with_a_length_in_words():
    texts = ["a b c", "a b c d", "a b c d e f g"]
    assert Length("between 4 and 6 words").explain([""] * 3, texts) == ["1 word too few", "", "1 word too many"]
    assert Length("at most 4 characters").explain(["", ""], texts[:2]) == [
        "1 character too many",
        "3 characters too many",
    ]


def test_versions_follow_the_request_and_the_kind_is_found():
    assert Length("5 words").version != Length("6 words").version != Length().version
    assert "length" in rewards.kinds()
    opened = rewards.get("length").load(None, dict(name="short", target="at most 5 words"))
    assert opened.name == "short" and opened.fixed == (0, 5, "word")
    assert rewards.get("length").load(None, dict(name="own", target=1)).fixed is None


def test_bad_input_raises_one_sentence():
    with pytest.raises(InputError, match="target is 'short', which asks for no length: expected '12 words'"):
        Length("short")
    with pytest.raises(InputError, match="target is 3, which asks for no length"):
        rewards.get("length").load(None, dict(name="x", target=3))
    with pytest.raises(InputError, match="the prompt 'Hello' asks reward 'length' for no length"):
        Length()(["Hello"], ["world"])
    with pytest.raises(InputError, match="'between 9 and 5 words' asks for no length: expected the smaller number"):
        asked("between 9 and 5 words")
