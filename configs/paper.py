"""The tasks of the papers about rewards at their size: language model, prompts, samples and updates. Every one needs an
accelerator, the model from the hub, and CTG_DATA_DIR.

They differ from the papers where these cannot be repeated: the Perspective API takes no new users, so that a bag of
words fitted on tweets rewards and another classifier judges toxicity; sentiment is rewarded by a bag of words fitted on
Yelp and judged by a probe fitted on SST-2; IMDB stands for WikiText-103. `docs/paper_settings.md` has every setting.
"""

from configs import reward, sentiment
from ctg_jax.types import InputError

LARGE, SMALL, XL = (f"openai-community/gpt2{size}" for size in ("-large", "", "-xl"))

# task -> the world whose prompts, rewards and judges it has
WORLDS = {"toxicity": "toxicity", "sentiment": "yelp", "sentiment_down": "yelp_down", "repetition": "repetition"}


def task_of(arg, tasks):
    """The task that an argument of a configuration names: "paper" is the first of `tasks`, "paper_NAME" another; None
    where the argument is no paper's."""
    if arg == "paper":
        return tasks[0]
    task = arg.removeprefix("paper_")
    if task == arg:
        return None
    if task not in tasks:
        names = ", ".join(f"paper_{name}" for name in tasks)
        raise InputError(f"the argument of the configuration is {arg!r}: expected paper or {names}")
    return task


def experiment(task, title, lm, arms, *, data=None, rewards=None, prompts=None, judges=None, **sample):
    """A whole configuration: a task with a language model of the hub, judged with 25 samples of each prompt.

    Args:
      arms: label -> arm, whose `fit` has its own rounds, `explore` and `training`.
      data, rewards: in place of those of the task's world, for exploring. prompts, judges: the same, for judging.
      sample: settings of `sample` in which the paper differs.
    """
    parts = reward.WORLDS[WORLDS[task]]()
    parts["lm"] = dict(source=lm, dtype="float32")
    parts["sample"] |= dict(n=25, max_new=20) | sample
    parts["evaluate"] |= dict(lm_name=XL, fluency=dict(source=XL, dtype="float32"))
    parts["prompts"] = prompts or parts["prompts"]
    parts["judges"] = judges or parts["judges"]
    learn = parts["learn"] | {k: v for k, v in dict(data=data, rewards=rewards).items() if v is not None}
    found = dict(base=dict(filter={}), top_p=dict()) | arms
    return sentiment.composed(title, {"train": None} | parts, reward.learning(learn, found))


def words(text):
    """The words of a text in lower case, without the punctuation beside them."""
    return "".join(c if c.isalpha() else " " for c in text.lower()).split()


def amazing(prompt, text):
    """1 where a text holds the word "amazing": the first single word of Khalifa et al. 2021, section 3."""
    return float("amazing" in words(text))


def politics(prompt, text):
    """1 where a text holds a word of a list about politics, shortened from that of PPLM."""
    listed = {"government", "election", "senate", "president", "vote", "law", "congress", "party", "policy", "minister"}
    return float(bool(listed & set(words(text))))


def female(prompt, text):
    """1 where female pronouns are more frequent than male ones."""
    found = words(text)
    return float(sum(map(found.count, ("she", "her", "hers"))) > sum(map(found.count, ("he", "his", "him"))))


def science(prompt, text):
    """1 where a biography is of a scientist."""
    return float(bool({"scientist", "physicist", "chemist", "biologist", "professor"} & set(words(text))))


def art(prompt, text):
    """1 where a biography is of an artist."""
    return float(bool({"artist", "painter", "sculptor", "musician", "poet"} & set(words(text))))


def features(*names):
    """The functions of this file as rewards."""
    return {name: dict(kind="function", function=f"configs.paper:{name}", version="1") for name in names}
