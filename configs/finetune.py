"""Fine-tuning (LoRA) on texts of one sentiment; the strength interpolates between the frozen model and the tuned one.

Source: Hu et al. 2021.

    python experiments/main.py --config=configs/finetune.py[:yelp|:gemma|:tiny]

Expected: each direction moves the share of positive text its way, further at full strength; perplexity under the base
stays low, since the samples are ordinary text of that sentiment. Wall time: five minutes on 2 cores after the LM.
In the gemma world positive text is no more frequent after 40 updates: perplexity is 52 with the first words of film
reviews at a rate of 0.001, and in the hundreds with Yelp reviews at 0.002. Which of the two matters was not tried.
"""

from configs import sentiment


def arms(arg):
    strengths = (1.0,) if arg == "tiny" else (0.5, 1.0)
    common = sentiment.training(arg)
    return {
        f"finetune_{name}": dict(method="finetune", fit=dict(where=dict(label=label), **common), strengths=strengths)
        for name, label in (("negative", 0), ("positive", 1))
    }


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Fine-tuning", dict(top_p=dict(), **arms(arg)))


def sweep():
    for rank in (2, 8):
        yield {"methods.finetune_positive.fit.adapter.rank": rank, "methods.finetune_negative.fit.adapter.rank": rank}
