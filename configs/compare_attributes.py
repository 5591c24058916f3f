"""Two attributes at once: sentiment and style, each chosen on its own, by vectors that were learned together.

Sources: Clive et al. 2022 (control prefixes), Chen et al. 2023 (mixtures of soft prompts), Lester et al. 2021.

    python experiments/compare.py --config=configs/compare_attributes.py[:tiny]

Every text of the corpus has a sentiment and is formal or not, independently. The vectors of both are learned on all
texts, and the four arms of a kind ask for the four combinations: `prefix` puts the vectors of both classes one after
the other into the keys and values of all layers, `prompt` before the tokens, `mean` and `attention` mix them into one
prompt. `prefix_00` asks for negative and plain text, `prefix_01` for negative and formal. Measured (commit 49f213c,
docs/results/length_and_search.md): each attribute follows its own request, prefixes furthest, and the correlation of a
request with the score of the other attribute is below 0.1 for all four.
"""

from configs import prompt, sentiment

KINDS = {
    "prefix": dict(place="prefix"),
    "prompt": dict(each=8),
    "mean": dict(each=8, mix="mean"),
    "attention": dict(each=8, mix="attention"),
}


def get_config(arg="bundled"):
    if arg not in ("bundled", "tiny"):
        raise sentiment.InputError(f"the argument of the configuration is {arg!r}: expected bundled or tiny")
    parts, tiny = sentiment.world(arg), arg == "tiny"
    training = sentiment.training(arg)["training"]
    styles = parts["train"] | dict(split="train", balance=None, labels=dict(formal={"1": 1, "0": 0}))
    styles["limit"] = 32 if tiny else 2000
    parts["judges"] = parts["judges"] | dict(formal=dict(kind="bag", data=styles))
    parts["train"] |= dict(balance=None)
    arms = dict(top_p=dict())
    for name, kind in KINDS.items():
        network = dict(network=prompt.SIZES.get(arg, (20, 10, 128))[2]) if name == "prefix" else {}
        shape = dict(length=1 if tiny else 4, attributes=dict(label=2, formal=2)) | network | kind
        if tiny:
            shape["each"] = 1
        fit = dict(shape=shape, training=training | dict(rate=1e-3 if name == "prefix" else 0.1))
        for label in (0, 1):
            for formal in (0, 1):
                chosen = dict(label=label, formal=formal)
                arms[f"{name}_{label}{formal}"] = dict(method="prompt", fit=fit | dict(chosen=chosen))
    return sentiment.composed("Two attributes", parts, arms)
