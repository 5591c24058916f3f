"""Fine-tuning (LoRA) on texts of one sentiment; the strength interpolates between the frozen model and the tuned one.

Source: Hu et al. 2021.

    python experiments/main.py --config=configs/finetune.py[:yelp|:gemma|:tiny]

Expected: each direction moves the share of positive text its way, further at full strength; perplexity under the base
stays low, since the samples are ordinary text of that sentiment. Wall time: five minutes on 2 cores after the LM.
In the gemma world both move the share their way, at a price in perplexity that the strength controls (18 without,
43 to 52 at 0.5, 249 to 302 at 1): the model takes up what else is in reviews. At rates of 0.001 to 0.002 text broke
without becoming more positive, so there the rate is lower and the updates are more.
"""

from configs import sentiment


def arms(arg):
    strengths = (1.0,) if arg == "tiny" else (0.5, 1.0)
    common = sentiment.training(arg)
    if arg == "gemma":
        common = dict(training=common["training"] | dict(steps=160, rate=3e-4))
    return {
        f"finetune_{name}": dict(method="finetune", fit=dict(where=dict(label=label), **common), strengths=strengths)
        for name, label in (("negative", 0), ("positive", 1))
    }


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Fine-tuning", dict(top_p=dict(), **arms(arg)))


def sweep():
    for rank in (2, 8):
        yield {"methods.finetune_positive.fit.adapter.rank": rank, "methods.finetune_negative.fit.adapter.rank": rank}
