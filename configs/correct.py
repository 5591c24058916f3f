"""A corrector that revises samples, at equal samples of the frozen model to learn from, beside the best of n.

Sources: Welleck et al. 2023 (Self-Correct), Vernikos et al. 2024 (LMCor, `combined`: one text from five samples),
Stiennon et al. 2020 (best of n).

    python experiments/main.py --config=configs/correct.py[:yelp|:toxicity|:gemma|:tiny|:paper]

Measured on Yelp with shorter fits (commit 1f2b329, docs/results/length_and_search.md): .31 positive under top-p, .49 by
the best of four, .53 after one correction for half of its tokens, .54 after three. `combined` learns from human text
and no reward, and so moves towards the data of the world: .27 there. With `paper` the model is GPT-2 Large on
RealToxicityPrompts, with 10 samples of each prompt to learn from.
"""

from configs import paper, reward, sentiment


def arms(arg):
    learn = sentiment.of_world(reward.WORLDS, arg)()["learn"]
    learn |= dict(data=sentiment.SHORT) if arg == "tiny" else {}
    training = dict(training=learn["training"])
    explore = learn["explore"] | dict(n=4 if arg == "tiny" else 10)
    fit = dict(explore=explore, rounds=learn["rounds"], **training)
    taught = dict(method="correct", data=learn["data"], rewards=learn["rewards"], fit=fit)
    pairs = dict(drafts=2) if arg == "tiny" else dict(drafts=5)
    of_people = dict(kind="combine", explore=learn["explore"] | dict(n=pairs["drafts"]), pairs=pairs, **training)
    found = dict(
        correct_1=taught | dict(correct=dict(turns=1)),
        correct_3=taught | dict(correct=dict(turns=3)),
        best_of_n=dict(best_of=(4,), rewards=learn["rewards"]),
    )
    if arg in ("bundled", "yelp", "yelp_down", "tiny"):  # where the prompts that are learned from have a text
        found["combined"] = dict(method="correct", fit=of_people, correct=pairs, data=learn["data"], rewards={})
    return found


def get_config(arg="bundled"):
    if arg == "paper":
        made = {name: arm for name, arm in arms("toxicity").items() if name.startswith("correct")}
        return paper.experiment("toxicity", "Correctors", paper.LARGE, made)
    config = reward.experiment(arg, "Correctors", dict(top_p=dict(), **arms(arg)))
    if arg == "tiny":
        config.prompts = sentiment.SHORT
    return config
