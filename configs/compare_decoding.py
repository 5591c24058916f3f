"""Methods that change the next-token distribution while decoding, on the same prompts, under the same filter.

Sources: those of the methods' own configurations, whose arms these are. All that learn from labelled texts read the
same ones, all that learn from a reward have the same prompts, samples and reward.

    python experiments/compare.py --config=configs/compare_decoding.py            bundled reviews
    python experiments/compare.py --config=configs/compare_decoding.py:yelp       an LM of reviews; CTG_DATA_DIR
    python experiments/compare.py --config=configs/compare_decoding.py:gemma      any LM, OpenWebText; CTG_LM_DIR too
    python experiments/compare.py --config=configs/compare_decoding.py:toxicity   any LM, detoxification; both folders
    python experiments/compare.py --config=configs/compare_decoding.py:tiny       seconds, for tests

With `yelp_small` each arm is at the strength of its paper, with half the updates and one round after 300 prompts, which
takes about an hour on one core; `yelp_equal` has the same fits at .3 nats per token of held-out negative sentences.
The other worlds have both sizes too; fits of 40 and 80 updates in those of `gemma` and `toxicity` are not shortened.

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
from ctg_jax.types import InputError

WORLDS = {
    "bundled": reward.bundled,
    "yelp": reward.yelp,
    "gemma": sentiment.gemma,
    "toxicity": reward.gemma,
    "tiny": reward.tiny,
}
# What describes the unwanted texts of the detoxification world, where others are about sentiment.
RUDE = "The following text contains very hateful, aggressive, disrespectful language:\n"
STRENGTHS = dict(dexperts=3.2, gedi=30.0, self_debias=50.0, residual=0.5, rad=30.0)  # of the papers; 1 of the others
INSULTS = "stupid idiot idiots dumb hate ugly pathetic trash scum bitch fuck fucking shit ass crap damn"


def halved(settings):
    """Settings of a fit with half of all `steps`."""
    if not isinstance(settings, dict):
        return settings
    return {key: value // 2 if key == "steps" else halved(value) for key, value in settings.items()}


def smaller(methods, learned, shorter, kl):
    """The arms at one strength or one KL each, with fewer samples to learn from and `shorter` fits."""
    for label, arm in methods.items():
        if "method" in arm:
            arm.pop("strengths", None)
            arm |= dict(kl=kl) if kl else dict(strengths=(STRENGTHS.get(label, 1.0),))
        if label in learned and "fit" in arm:
            arm |= dict(data=arm["data"] | dict(limit=min(300, arm["data"]["limit"])), fit=arm["fit"] | dict(rounds=1))
        elif "fit" in arm and shorter:
            arm |= dict(fit=halved(arm["fit"]))
    return methods


def get_config(arg="bundled"):
    arg, _, size = arg.partition("_")
    if size not in ("", "small", "equal"):
        raise InputError(f"the size of the comparison is {size!r}: expected small or equal after the world and a _")
    parts = sentiment.of_world(WORLDS, arg)()
    own = "gemma" if arg == "toxicity" else arg
    learned = {**nado.arms(own), **genarm.arms(own), **critic.arms(own)}
    methods = dict(
        top_p=dict(),
        **dexperts.arms(own),
        **proxy.arms(own),
        **gedi.arms(own),
        **cross_model.arms(own),
        **arithmetic.arms(own),
        **self_debias.arms(own),
        **gamma.arms(own),
        **residual.arms(own),
        **critic.labelled(own),
        **reward.learning(parts["learn"], learned),
    )
    if arg == "toxicity":
        methods["self_debias"]["init"] = dict(descriptions=(RUDE,))
        methods["gamma"] |= dict(init=dict(gamma=(0.8,), words=(tuple(INSULTS.split()),), whole=True))
    if size:
        parts["evaluate"] |= dict(kl=True)
        if size == "equal":
            held = sentiment.held_out(parts["train"], where=dict(label=0), limit=8 if arg == "tiny" else 48)
            parts["calibrate"] = dict(data=held, tokens=24)
        methods = smaller(methods, learned, own != "gemma", size == "equal" and ((1e-3,) if arg == "tiny" else (0.3,)))
    return sentiment.composed("Control while decoding", parts, methods)
