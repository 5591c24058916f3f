"""Sentiment control at equal KL: every method at the strengths at which it changes the model equally.

The raw strengths of two methods cannot be compared. Here each arm asks for a KL to the base, in nats per token of
held-out texts, and the strength that gives it is solved for (`ctg_jax.stages.strengths.calibrate`); a negative number
asks for the other direction. The report draws the attribute against the KL of the samples.

    python experiments/compare.py --config=configs/compare_equal_kl.py            bundled reviews
    python experiments/compare.py --config=configs/compare_equal_kl.py:yelp       real LM, real prompts; CTG_DATA_DIR
    python experiments/compare.py --config=configs/compare_equal_kl.py:gemma      any LM, OpenWebText; CTG_LM_DIR too
    python experiments/compare.py --config=configs/compare_equal_kl.py:tiny       seconds, for tests

Expected, not measured yet: at a small KL every method moves the share of positive text, and their order is that of how
much of what they change is sentiment. Wall time: that of `compare_sentiment.py` and about ten passes over the held-out
texts for each strength.
"""

from configs import cav, dexperts, finetune, lm_steer, sentiment, steer

LEVELS = (-0.3, -0.1, 0.1, 0.3)
TINY = (-1e-3, 1e-3)


def get_config(arg="bundled"):
    parts = sentiment.world(arg)
    levels = TINY if arg == "tiny" else LEVELS
    methods = dict(base=dict(filter={}), top_p=dict())
    for module in (steer, lm_steer) if arg == "tiny" else (steer, cav, lm_steer, finetune, dexperts):
        for label, arm in module.arms(arg).items():
            arm = {key: value for key, value in arm.items() if key != "strengths"}
            one_way = label.startswith("finetune")
            methods[label] = arm | dict(kl=tuple(x for x in levels if x > 0 or not one_way))
    held = sentiment.held_out(parts["train"], limit=8 if arg == "tiny" else 64)
    parts["calibrate"] = dict(data=held, tokens=32)
    return sentiment.composed("Sentiment control at equal KL", parts, methods)
