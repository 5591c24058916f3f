"""Control codes: one LM that writes either sentiment, by the code before the text.

Source: Keskar et al. 2019. With two codes it is also negative-aware training (Wang et al. 2024). The penalised sampling
of the paper is `filter=dict(repetition_penalty=1.2)`, of `ctg_jax.controls.truncate`; the arm `penalised` shows it.

    python experiments/main.py --config=configs/ctrl.py[:yelp|:tiny]

Expected: the first code (strength 0) writes negative text, the last (strength 1) positive, each about as far as LoRA
fine-tuning on that label alone; the penalty raises diversity and perplexity. Wall time: four minutes on 2 cores after
the LM.
"""

from configs import sentiment


def arms(arg):
    common = sentiment.training(arg)
    strengths = (0.0, 1.0)
    return {
        "ctrl": dict(method="ctrl", fit=dict(codes=2, **common), strengths=strengths),
        "penalised": dict(
            method="ctrl", fit=dict(codes=2, **common), strengths=strengths, filter=dict(repetition_penalty=1.2)
        ),
    }


def get_config(arg="bundled"):
    return sentiment.experiment(arg, "Control codes", dict(top_p=dict(), **arms(arg)))


def sweep():
    for kind in ("lora", "full"):
        yield {"methods.ctrl.fit.adapter.kind": kind}
    for rank in (2, 8):
        yield {"methods.ctrl.fit.adapter.rank": rank}
