"""Model arithmetic: away from negative texts by a bias, by a union, and by a union together with a classifier.

Source: Dekoninck et al. 2024; 0.6 and 0.96 are the authors' weights.

    python experiments/main.py --config=configs/arithmetic.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/arithmetic.py[:yelp|:tiny]

N is a LoRA tuned on negative texts; with `paper` it is Llama 2 13B after a sentence that asks for them, and there is no
classifier. Expected from the paper: the union keeps perplexity lower than the bias at an equal share of positive text,
and the union with the classifier has the highest share.
In a look at 120 texts of Yelp, with a negative sentence as N and 0.9 in the union, 17 % had more positive than negative
words under the bias and under the union (8 % under top-p), at a perplexity under the base of 36 and 21 (17).
"""

from configs import sentiment

FORMULAS = dict(bias="M - 0.6 * N", union="M - 0.96 * (N | M)", classified="M - 0.96 * (N | M) + 0.04 * C")
TOLD = "The following review is very negative:\n"
PAPER = [dict(formula=FORMULAS[name], prompts=dict(N=TOLD)) for name in ("bias", "union")]
HEAD = dict(
    bundled=dict(steps=300, batch=16),
    yelp=dict(steps=500, batch=32, tokens=32),
    gemma=dict(steps=150, batch=16, tokens=32),
    tiny=dict(steps=2, batch=4),
)


def arms(arg):
    strengths = (1.0,) if arg == "tiny" else (0.25, 0.5, 1.0)
    fit = dict(tuned=dict(N=dict(label=0)), **sentiment.training(arg))
    found = {}
    for name, formula in FORMULAS.items():
        head = dict(classifier=dict(training=sentiment.of_world(HEAD, arg))) if name == "classified" else {}
        settings = dict(formula=formula, **head, **fit)
        found[f"arithmetic_{name}"] = dict(method="arithmetic", fit=settings, strengths=strengths)
    return found


def get_config(arg="bundled"):
    if arg == "paper":
        made = {f"arithmetic_{i}": dict(method="arithmetic", init=init) for i, init in enumerate(PAPER)}
        return sentiment.paper("meta-llama/Llama-2-13b-hf", "Model arithmetic", dict(top_p=dict(), **made), max_new=32)
    return sentiment.experiment(arg, "Model arithmetic", dict(top_p=dict(), **arms(arg)))


def sweep():
    for weight in (0.5, 0.9, 0.99):
        yield {"methods.arithmetic_union.fit.formula": f"M - {weight} * (N | M)"}
