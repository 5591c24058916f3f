"""Control codes: one LM that writes either sentiment, by the code before the text.

Source: Keskar et al. 2019. With two codes it is also negative-aware training (Wang et al. 2024). The penalised sampling
of the paper is `filter=dict(repetition_penalty=1.2)`, of `ctg_jax.controls.truncate`; the arm `penalised` shows it.

    python experiments/main.py --config=configs/ctrl.py[:yelp|:tiny|:paper]

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


# The paper trains 1.63 B parameters on 140 GB from nothing: 256 tokens, Adagrad at .05, 1,024 rows, 800,000 updates.
# Here all weights of the model that is nearest in size learn the codes, with Adam.
PAPER = dict(
    codes=2,
    adapter=dict(kind="full"),
    training=dict(
        steps=5000, batch=64, tokens=256, rate=1e-5, warmup=500, schedule="linear", clip=0.25, save_every=500
    ),
)


def paper_arms():
    penalised = dict(filter=dict(repetition_penalty=1.2), strengths=(0.0, 1.0))
    return dict(ctrl=dict(method="ctrl", fit=PAPER) | penalised)


def get_config(arg="bundled"):
    if arg == "paper":
        return sentiment.paper("openai-community/gpt2-xl", "Control codes", dict(top_p=dict(), **paper_arms()), n=25)
    return sentiment.experiment(arg, "Control codes", dict(top_p=dict(), **arms(arg)))


def sweep():
    for kind in ("lora", "full"):
        yield {"methods.ctrl.fit.adapter.kind": kind}
    for rank in (2, 8):
        yield {"methods.ctrl.fit.adapter.rank": rank}
