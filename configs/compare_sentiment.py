"""Sentiment control: every method on the same prompts with the same decoding.

Sources: Liu et al. 2021 (DExperts), Hu et al. 2021 (LoRA), Subramani et al. 2022 and Turner et al. 2023 (steering),
Zhang et al. 2025 (concept activation vectors), Han et al. 2024 (LM-Steer), Holtzman et al. 2020 (top-p). The protocol
is the field's: several samples of each prompt under top-p 0.9, the share of positive ones, perplexity under the base
LM, distinct n-grams, each with a bootstrap interval over prompts.

    python experiments/compare.py --config=configs/compare_sentiment.py            bundled reviews
    python experiments/compare.py --config=configs/compare_sentiment.py:yelp       real LM, real prompts; CTG_DATA_DIR
    python experiments/compare.py --config=configs/compare_sentiment.py:gemma      any LM, OpenWebText; CTG_LM_DIR too
    python experiments/compare.py --config=configs/compare_sentiment.py:tiny       seconds, for tests

Expected: steer, finetune and dexperts move the share of positive text in both directions and the more the stronger,
until perplexity rises; base and top-p stay where the prompts put them. Wall time on 2 cores: see RESULTS.md.
"""

from configs import cav, dexperts, finetune, lm_steer, quark, reward, sentiment, steer


def get_config(arg="bundled"):
    methods = dict(
        base=dict(filter={}),
        top_p=dict(),
        **steer.arms(arg),
        **cav.arms(arg),
        **lm_steer.arms(arg),
        **finetune.arms(arg),
        **dexperts.arms(arg),
    )
    parts = sentiment.world(arg)
    if arg == "gemma":
        methods |= reward.learning(parts["learn"], quark.arms(arg))
    return sentiment.composed("Sentiment control", parts, methods)
