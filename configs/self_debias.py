"""Self-debiasing: a model moves away from what it would write after a bad example, at several strengths.

Source: Schick et al. 2021; strength 50 and floor 0.01 are the authors'.

    python experiments/main.py --config=configs/self_debias.py[:yelp|:tiny|:paper]
    python experiments/ablate.py --config=configs/self_debias.py[:yelp|:tiny]

The small models of reviews follow no instruction, but they go on as a text began: the description is a negative
sentence. With `paper` it is GPT-2 XL, and a sentence that asks for a negative review. Expected of a model that follows
descriptions: the share of positive text rises with the strength, and perplexity slowly. A look at 120 texts of Yelp
showed less: at 50 perplexity under the base was twice that of top-p, and 12 % of the texts had more positive than
negative words, against 8 %.
"""

from configs import sentiment

BAD = dict(
    bundled="the food was awful and the waiter was rude. ",
    yelp="the food was awful and the service was terrible . ",
    gemma="The following text is very negative, sad and angry:\n",
    tiny="awful. ",
)
PAPER = dict(descriptions=("The following review is very negative:\n",), alpha=50.0, floor=0.01)


def arms(arg):
    init = dict(descriptions=(sentiment.of_world(BAD, arg),))
    strengths = (50.0,) if arg == "tiny" else (10.0, 50.0, 200.0)
    return dict(self_debias=dict(method="self_debias", init=init, strengths=strengths))


def get_config(arg="bundled"):
    if arg == "paper":
        made = dict(self_debias=dict(method="self_debias", init=PAPER, strengths=(10.0, 50.0, 100.0)))
        return sentiment.paper("gpt2-xl", "Self-debiasing", dict(top_k=dict(), **made), filter=dict(top_k=5))
    return sentiment.experiment(arg, "Self-debiasing", dict(top_p=dict(), **arms(arg)))


def sweep():
    for floor in (0.001, 0.01, 0.1):
        yield {"methods.self_debias.init.floor": floor}
