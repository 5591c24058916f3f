"""Instructions that code can verify (IFEval, Zhou et al. 2023), followed by chance, by search and by a constraint.

    python experiments/compare.py --config=configs/instructions.py[:gemma|:yelp|:tiny]

Prompts are those of `bundled:instructions`, made by templates in IFEval's layout; IFEval's own file is used with
--config.prompts.source=jsonl:PATH and the same for the data of the judges and rewards. `follows` is strict and
`loosely` is the paper's loose criterion: the share of texts that follow all instructions of their prompt, and as a mean
the share of instructions. Expected, not measured yet: a model that was not taught to follow instructions does so by
chance, above all where they forbid something, and the best of 16 doubles its share.
"""

from configs import sentiment


def get_config(arg="bundled"):
    parts = sentiment.world(arg)
    tiny = arg == "tiny"
    # The tiny world has no room for a whole prompt.
    text = dict(prompt="{topic}", text="{topic}") if tiny else "prompt"
    parts["prompts"] = dict(source="bundled:instructions", split="test", text=text, limit=2 if tiny else 40)
    judge = dict(kind="instructions", data=dict(parts["prompts"]))
    parts["judges"] = dict(follows=judge, loosely=judge | dict(target="loose"))
    parts["evaluate"].pop("kl", None)
    parts["sample"] |= {} if tiny else dict(n=4, max_new=40)
    rewards = dict(follows=judge)
    return sentiment.composed("Instructions", parts, dict(
        top_p=dict(),
        best=dict(search=dict(n=2 if tiny else 16), rewards=rewards),
        accepted=dict(search=dict(n=2 if tiny else 16, accept=1.0), rewards=rewards),
    ))  # fmt: skip
