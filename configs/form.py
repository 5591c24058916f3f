"""Constraints of form: reviews as JSON of a schema, and texts in which words must or must not appear.

    python experiments/main.py --config=configs/form.py[:yelp|:tiny]
    python experiments/ablate.py --config=configs/form.py[:yelp|:tiny]

The control that a run makes is used with `experiments/generate.py --control PATH`. Needs `pip install -e '.[form]'`.

Expected: every text has its form at strength 1. The share of positive text rises where a positive word must appear and
falls where a negative one must, and perplexity rises most for JSON, which the language models have not seen.
"""

from configs import sentiment

REVIEW = {
    "type": "object",
    "properties": {"text": {"type": "string", "maxLength": 60}, "stars": {"enum": [1, 2, 3, 4, 5]}},
    "required": ["text", "stars"],
}
FORMS = dict(
    praise=dict(words=("good",), without=("bad", "not")),
    blame=dict(words=("bad",), without=("good", "not")),
    short=dict(regex=r"[^.]{1,80}\."),
    json=dict(schema=REVIEW),
)


def arms(arg):
    forms = dict(praise=dict(words=("go",), without=("ba",))) if arg == "tiny" else FORMS
    return {name: dict(method="form", init=dict(forms=(form,)), strengths=(1.0,)) for name, form in forms.items()}


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Constraints of form", dict(top_p=dict(), **arms(arg)))


def sweep():
    for word in ("great", "awful"):
        yield {"methods.praise.init.forms": (dict(words=(word,)),)}
