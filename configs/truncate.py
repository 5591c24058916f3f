"""Decoding without control: what temperature and truncation do to diversity, repetition and perplexity.

Sources: Holtzman et al. 2020 (top-p), Fan et al. 2018 (top-k), Meister et al. 2023 (typical), Nguyen et al.
2024 (min-p).

    python experiments/main.py --config=configs/truncate.py[:yelp|:gemma|:tiny]

Expected: pure sampling has the highest perplexity and the most distinct n-grams; every truncation trades one for the
other; the share of positive text stays. Wall time: two minutes on 2 cores after the LM is there.
"""

from configs import sentiment


def get_config(arg="bundled"):
    settings = dict(
        pure={},
        top_p=dict(top_p=0.9),
        top_k=dict(top_k=40),
        typical=dict(typical_p=0.95),
        min_p=dict(min_p=0.05),
        cold=dict(temperature=0.7),
    )
    methods = {label: dict(filter=filter) for label, filter in settings.items()}
    return sentiment.experiment(arg, "Truncation", methods)


def sweep():
    for p in (0.5, 0.8, 0.9, 0.95):
        yield {"methods.top_p.filter.top_p": p}
