"""Methods that change the next-token distribution while decoding, on the same prompts, under the same filter.

Sources: those of the methods' own configurations, whose arms these are. All that learn from labelled texts read the
same ones, all that learn from a reward have the same prompts, samples and reward.

    python experiments/compare.py --config=configs/compare_decoding.py            bundled reviews
    python experiments/compare.py --config=configs/compare_decoding.py:yelp       an LM of reviews; CTG_DATA_DIR
    python experiments/compare.py --config=configs/compare_decoding.py:gemma      any LM, OpenWebText; CTG_LM_DIR too
    python experiments/compare.py --config=configs/compare_decoding.py:toxicity   any LM, detoxification; both folders
    python experiments/compare.py --config=configs/compare_decoding.py:tiny       seconds, for tests

Expected from the papers, at equal KL to the base: dexperts, genarm and nado have the largest share of positive text,
then the critics, fudge, gedi, gamma; perplexity rises most under gedi.
"""

from configs import (
    arithmetic,
    critic,
    cross_model,
    dexperts,
    gamma,
    gedi,
    genarm,
    nado,
    proxy,
    residual,
    reward,
    self_debias,
    sentiment,
)

WORLDS = {
    "bundled": reward.bundled,
    "yelp": reward.yelp,
    "gemma": sentiment.gemma,
    "toxicity": reward.gemma,
    "tiny": reward.tiny,
}
# What describes the unwanted texts of the detoxification world, where others are about sentiment.
RUDE = "The following text contains very hateful, aggressive, disrespectful language:\n"
INSULTS = "stupid idiot idiots dumb hate ugly pathetic trash scum bitch fuck fucking shit ass crap damn"


def get_config(arg="bundled"):
    parts = sentiment.of_world(WORLDS, arg)()
    size = "gemma" if arg == "toxicity" else arg
    learned = {**nado.arms(size), **genarm.arms(size), **critic.arms(size)}
    methods = dict(
        top_p=dict(),
        **dexperts.arms(size),
        **proxy.arms(size),
        **gedi.arms(size),
        **cross_model.arms(size),
        **arithmetic.arms(size),
        **self_debias.arms(size),
        **gamma.arms(size),
        **residual.arms(size),
        **critic.labelled(size),
        **reward.learning(parts["learn"], learned),
    )
    if arg == "toxicity":
        methods["self_debias"]["init"] = dict(descriptions=(RUDE,))
        methods["gamma"] |= dict(init=dict(gamma=(0.8,), words=(tuple(INSULTS.split()),), whole=True))
    return sentiment.composed("Control while decoding", parts, methods)
