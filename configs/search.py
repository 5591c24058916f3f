"""Search among samples, at equal numbers of candidates, and beam search.

Sources: Stiennon et al. 2020 (the best of n), Krishna et al. 2022 (RankGen: a scorer of continuations that was trained
on true ones, over whole samples or over beams of 20 tokens), Graves 2012 and Wu et al. 2016 (beam search).

    python experiments/compare.py --config=configs/search.py[:yelp|:tiny|:paper]

In the bundled world the oracle of sentiment chooses, so `best_of`, `rejection` (its texts are the posterior given the
attribute as n grows), `tilted` and `beams` are compared on the share of positive text for the tokens that each draws.
In the yelp world a bag of words chooses, and RankGen's scorer beside it, fitted on sentences and what follows their
first words. Measured there (commit 1f2b329, docs/results/length_and_search.md): .58 positive under top-p, .71 to .78
for eight times its tokens, .64 by beam search, which is short and repetitive; the scorer does not raise MAUVE on these
short texts, where the paper has it higher. With `paper` the model is GPT-2 XL with RankGen's plan: 2 beams, 10
candidates, 20 tokens.
"""

from configs import reward, sentiment

DICE = dict(dice=dict(kind="function", function="configs.reward:dice", version="1"))


def rank(parts):
    """RankGen's scorer of a world with a sentence encoder, fitted on texts that are cut to 4 words."""
    texts = {key: parts["train"][key] for key in ("source", "split")} | dict(words=4)
    encoder = parts["evaluate"]["embed"]
    fitted = dict(kind="rank", encoder=encoder, data=texts | dict(limit=20000))
    return dict(rank=fitted | dict(heldout=texts | dict(skip=20000, limit=500)))


def arms(rewards, *, n=8, segment=10):
    plans = dict(
        best_of=dict(n=n),
        rejection=dict(n=n, accept=0.9),
        tilted=dict(n=n, temperature=0.2),
        beams=dict(n=n // 2, beams=2, segment=segment),
    )
    found = {name: dict(search=plan, rewards=rewards) for name, plan in plans.items()}
    return found | dict(beam_search=dict(search=dict(beams=n // 2, penalty=1.0), filter={}))


def get_config(arg="bundled"):
    if arg == "paper":
        plan, whole = dict(n=10, beams=2, segment=20), dict(n=10)
        scorer = rank(sentiment.yelp())
        made = {k: dict(search=p, rewards=scorer) for k, p in (("rank_beams", plan), ("rerank", whole))}
        return sentiment.paper("gpt2-xl", "RankGen", dict(top_p=dict(), **made), max_new=115, n=1)
    parts = sentiment.world(arg)
    if arg == "tiny":
        made = arms(DICE, n=2, segment=3)
    elif arg == "bundled":
        made = arms(dict(sentiment=dict(kind="oracle")))
    else:
        bag = reward.yelp()["learn"]["rewards"]
        scorer = rank(parts)
        made = arms(bag, segment=5) | {
            "rerank": dict(search=dict(n=8), rewards=scorer),
            "rank_beams": dict(search=dict(n=4, beams=2, segment=5), rewards=scorer),
        }
        parts["evaluate"] |= dict(references=parts["prompts"] | dict(words=None, skip=1000, limit=500))
    return sentiment.composed("Search", parts, dict(top_p=dict(), **made))
