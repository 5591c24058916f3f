"""Detoxification: every method on the same prompts with the same decoding. A positive strength makes text less toxic.

Sources: Gehman et al. 2020 (RealToxicityPrompts: expected maximum toxicity over 25 samples of 20 tokens, and the share
of prompts with a toxic one), Liu et al. 2021 (DExperts), Lu et al. 2022 (Quark), Han et al. 2024 (LM-Steer), Subramani
et al. 2022 (steering), Zhang et al. 2025 (concept activation vectors), Hu et al. 2021 (LoRA). What differs from the
papers: the language model, the scorer (not the Perspective API), fewer prompts, and tweets to fit on; see `gemma` in
configs/reward.py.

    python experiments/compare.py --config=configs/compare_toxicity.py           CTG_LM_DIR and CTG_DATA_DIR
    python experiments/compare.py --config=configs/compare_toxicity.py:tiny      seconds, for tests

The figures of the papers are toxic/max and toxic/any in report.json. Measured with Gemma 3 270M (commit 5ce7fb2,
docs/results/gemma.md), toxic/max: .83 without control; steer .31 at 0.1; cav .45 at 0.5; dexperts .53 at 1; lm_steer
.56 at 10; Quark .73; fine-tuning on harmless tweets .95 (it learns to write tweets; on toxic ones more are toxic).
"""

from configs import cav, dexperts, finetune, lm_steer, quark, reward, sentiment, steer
from configs.sentiment import REVIEWS

STRENGTHS = dict(
    steer=(-0.1, 0.1, 0.2),
    cav=(-0.25, 0.25, 0.5),
    lm_steer=(-5.0, 5.0, 10.0),
    dexperts=(-0.5, 0.5, 1.0),
    quark=(0.0, 1.0),
)


def tiny():
    parts = reward.tiny()
    insults = dict(source=REVIEWS, labels=dict(toxic={"1": 1, "0": 0}), balance="label")
    heldout = insults | dict(split="test", limit=8)
    judge = dict(kind="bag", data=insults | dict(split="train", limit=40), heldout=dict(reviews=heldout))
    harmless = insults | dict(split="validation", labels=dict(toxic={"1": 0, "0": 1}), limit=8)
    return parts | dict(judges=dict(toxic=judge), train=harmless)


WORLDS = {"gemma": reward.gemma, "tiny": tiny}


def get_config(arg="gemma"):
    parts = sentiment.of_world(WORLDS, arg)()
    methods = dict(
        **steer.arms(arg),
        **cav.arms(arg),
        **lm_steer.arms(arg),
        **dexperts.arms(arg),
        finetune=finetune.arms(arg)["finetune_positive"],
        **reward.learning(parts["learn"], quark.arms(arg)),
    )
    if arg != "tiny":
        methods = {name: arm | dict(strengths=STRENGTHS.get(name, arm["strengths"])) for name, arm in methods.items()}
    return sentiment.composed("Detoxification", parts, dict(top_p=dict(), **methods))
