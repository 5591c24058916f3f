"""Words and facts that a text must mention: keywords in the prompt, an automaton, and a search for coverage.

Sources: Lin et al. 2020 (CommonGen: a sentence with all of three to five concepts), Novikova et al. 2017 (E2E: a text
that states the slots of a restaurant), Willard & Louf 2023 (the automaton), Stiennon et al. 2020 (the best of n).

    python experiments/compare.py --config=configs/compare_keywords.py[:commongen|:e2e|:tiny]

`tuned` is a LoRA on human texts whose prompts hold the concepts or slots, as in "field look stand =". In `automaton`
its texts must also hold every word as it is in the prompt; `best` and `accepted` choose among its samples by coverage,
the second stops at the first that covers all. Measured on CommonGen with half the updates (commit 81727a3,
docs/results/length_and_search.md): the automaton covers every word, at the end of texts that it makes as long as they
may be; the small language model of the yelp world hardly learns to take words from its prompt (.01), and the best of 8
covers .05. CTG_DATA_DIR is the folder of the corpora, which both worlds read by path; the files of E2E that are used
are those with references, and the language model and the sentence encoder are those of the yelp world. Needs `pip
install -e '.[form,metrics]'`.
"""

from configs import sentiment
from ctg_jax.data import load
from ctg_jax.rewards.slots import slots

PROMPTS = {"commongen": 12, "e2e": 12}  # an automaton for each, in one table
LITERAL = ("name", "eatType", "food", "near")  # slots of E2E whose value a text states as it is


def commongen(folder):
    text = dict(prompt="{concepts} =", text="{concepts} = {sentence}", keywords="concepts")

    def lines(split):
        stem = f"{folder}/commongen/commongen.{split}"
        return f"lines:concepts={stem}.src_alpha.txt|sentence={stem}.tgt.txt"

    asked = [(row["concepts"], row["concepts"].split()) for row in load(lines("dev"), "all", text="concepts")]
    train = dict(source=lines("train"), split="all", text=text, limit=20000)
    return train, dict(source=lines("dev"), text=text), "concepts", asked, dict(kind="keywords")


def e2e(folder):
    text, folder = dict(prompt="{mr} =", text="{mr} = {ref}"), f"{folder}/e2e/orig"
    given = [row["mr"] for row in load(f"csv:{folder}/testset_w_refs.csv", "all", text="mr")]
    asked = [(mr, [value for name, value in slots(mr) if name in LITERAL]) for mr in given]
    train = dict(source=f"csv:{folder}/devset.csv", split="all", text=text)
    return train, dict(source=f"csv:{folder}/testset_w_refs.csv", text=text), "mr", asked, dict(kind="slots")


WORLDS = {"commongen": commongen, "e2e": e2e}


def world(arg):
    """(parts of the world, the words of each prompt, the judge of coverage)."""
    if arg == "tiny":
        parts = sentiment.tiny()
        text = dict(prompt="{first} =", text="{first} = {last}", keywords="{last}")
        parts["prompts"] |= dict(text=text)
        parts["train"] |= dict(text=text)
        return parts, [("go",), ("ba",)], dict(kind="keywords", data=dict(parts["prompts"]))
    make, parts = sentiment.of_world(WORLDS, arg), sentiment.yelp()
    train, prompts, field, asked, judge = make(sentiment.data_folder(arg, f"{arg}/ and models/"))
    # A prompt is on several lines, one for each reference.
    starts = [i for i in range(len(asked)) if i == 0 or asked[i] != asked[i - 1]]
    words, count = [asked[i][1] for i in starts[: PROMPTS[arg]]], starts[PROMPTS[arg]]
    prompts |= dict(split=f"all[:{count}]", balance=field, limit=1)
    parts |= dict(prompts=prompts, train=train, sample=dict(n=8, max_new=40, batch=96, filter=dict(top_p=0.9)))
    parts["evaluate"] = dict(lm_name="yelp-gpt2-mini", resamples=1000)
    return parts, words, judge | (dict(data=dict(prompts)) if judge["kind"] == "keywords" else {})


def get_config(arg="commongen"):
    parts, asked, judge = world(arg)
    tiny = arg == "tiny"
    parts["judges"] = dict(covered=judge)
    training = dict(steps=2, batch=4, tokens=16) if tiny else dict(steps=600, batch=32, tokens=72, schedule="linear")
    n, rewards = 2 if tiny else 8, dict(covered=dict(judge))
    adapter = dict(rank=2 if tiny else 16)
    sizes = {} if tiny else dict(states=4096, classes=1024)
    forms = tuple(dict(words=tuple(words)) for words in asked)
    return sentiment.composed("Coverage", parts, dict(
        top_p=dict(),
        tuned=dict(method="finetune", fit=dict(adapter=adapter, training=training)),
        form=dict(method="form", init=dict(forms=forms, choice="form", **sizes)),
        automaton=dict(chain=dict(tuned=1.0, form=1.0)),
        best=dict(search=dict(n=n), chain=dict(tuned=1.0), rewards=rewards),
        accepted=dict(search=dict(n=n, accept=1.0), chain=dict(tuned=1.0), rewards=rewards),
    ))  # fmt: skip


def sweep():
    for n in (2, 32):
        yield {"methods.best.search.n": n}
