"""Where steering acts best: blocks and tokens, at equal KL, on held-out prompts; see `ctg_jax.choose`.

    python experiments/choose.py --config=configs/choose_steering.py:gemma       sentiment; CTG_LM_DIR, CTG_DATA_DIR
    python experiments/choose.py --config=configs/choose_steering.py:toxicity    the same LM, away from toxic text
    python experiments/choose.py --config=configs/choose_steering.py:tiny        seconds, for tests

The arms are the candidates. What is best here is compared with the others on new prompts by compare_steering.py
(`--config.methods.steer_add.fit.sites=[9]`). The first line of the table is the best: with Gemma 3 270M block 9 on
all tokens (commit d197920, docs/results/steering.md). Wall time on one core with that model: about twenty minutes, and
a quarter of an hour for the judge the first time.
"""

from configs import compare_steering, sentiment
from configs.sentiment import of_world

BLOCKS = dict(bundled=(1, 2), gemma=(5, 9, 11, 14), toxicity=(5, 9, 11, 14), tiny=(1, 2))
TOKENS = dict(bundled=("all", "generated", "answer"), gemma=("all", "generated", "answer"), tiny=("all",))
TOKENS |= dict(toxicity=TOKENS["gemma"])


def get_config(arg="bundled"):
    blocks = of_world(BLOCKS, arg)
    parts = compare_steering.WORLDS[arg]()
    parts.pop("condition", None)
    skip = {} if arg == "tiny" else dict(skip=100)
    parts["prompts"] = parts["prompts"] | skip
    fit, kl = compare_steering.FIT[arg], compare_steering.LEVELS[arg]
    arms = {
        f"block_{block}_{tokens}": dict(method="steer", fit=fit | dict(sites=[block], positions=tokens), kl=kl)
        for block in blocks
        for tokens in TOKENS[arg]
    }
    return sentiment.composed("Where steering acts best", parts, arms)
