"""Steering at equal KL: every operator, every choice of tokens, and conditional steering, with one vector.

Sources: Subramani et al. 2022, Turner et al. 2023, Rimsky et al. 2024 (adding), Arditi et al. 2024 (ablation), Lee et
al. 2024 (conditional). Each arm is at the strength at which it changes held-out texts by as many nats per token; the
first `prompt` tokens of these texts count as their prompt, so that arms which act on prompts have one to act on.

    python experiments/compare.py --config=configs/compare_steering.py             bundled reviews
    python experiments/compare.py --config=configs/compare_steering.py:gemma       sentiment; CTG_LM_DIR, CTG_DATA_DIR
    python experiments/compare.py --config=configs/compare_steering.py:toxicity    the same LM, away from toxic text
    python experiments/compare.py --config=configs/compare_steering.py:others      the same arms after harmless prompts
    python experiments/compare.py --config=configs/compare_steering.py:tiny        seconds, for tests

`others` samples without a filter, so that `kl` is that of the control alone: a conditional control that was told to act
after toxic prompts should have hardly any there. Layer and tokens are chosen by configs/choose_steering.py. Measured
with Gemma 3 270M at .3 nats per token (commit f51027d, docs/results/steering.md): share positive .54 without control;
adding .94, rotating .88, clamping .77, ablating .19; on the generated tokens .91, on the prompt .83, on its last .66;
conditional .88. After harmless prompts the conditional control has .07 of its KL after toxic ones (commit 1f2b329).
Wall time on one core: about half an hour for each argument, and a quarter more for the judge the first time.
"""

from configs import reward, sentiment
from configs.sentiment import of_world

OPERATORS = ("add", "ablate", "rotate", "clamp")
SELECTIONS = dict(
    prompt="prompt",
    generated="generated",
    answer="answer",
    last="last",
    third=dict(part="generated", every=3),
    window=dict(part="generated", stop=8),
)
STREAM = dict(normalise="stream", pool="mean", tokens=48)
FIT = dict(bundled=dict(pool="mean", tokens=48), gemma=STREAM, toxicity=STREAM, others=STREAM)
FIT |= dict(tiny=dict(pool="mean", tokens=16))
LEVELS = dict(bundled=(0.1, 0.3), gemma=(0.3,), toxicity=(0.3,), others=(0.3,), tiny=(1e-3,))


def held_out(parts, label):
    """Sentences of RealToxicityPrompts whose first half is toxic (1) or not (0), which no method is fitted on."""
    folder = sentiment.data_folder("gemma", "realtoxicityprompts/")
    halves = dict(prompt="{prompt}", text="{prompt}{continuation}")
    found = dict(source=f"jsonl:{folder}/realtoxicityprompts/prompts.jsonl", split="all[2000:3000]", text=halves)
    found |= dict(labels=dict(prompt_toxicity=[0.5]), where=dict(label=label), limit=24)
    return parts | dict(calibrate=dict(data=found, tokens=24, prompt=8))


def gemma():
    parts = held_out(sentiment.gemma(), 0)
    measure = parts["evaluate"] | dict(kl=True)
    return parts | dict(prompts=parts["prompts"] | dict(limit=25), sample=parts["sample"] | dict(n=4), evaluate=measure)


def toxicity(label=1, filter=None):
    parts = held_out(reward.gemma(), 1)
    source = parts["calibrate"]["data"]
    prompts = dict(source=source["source"], split="all[:2000]", text="prompt", labels=source["labels"])
    sample = parts["sample"] | dict(n=4) | ({} if filter is None else dict(filter=filter))
    return parts | dict(
        prompts=parts["prompts"] | dict(limit=25, where=dict(label=label)),
        sample=sample,
        evaluate=parts["evaluate"] | dict(kl=True),
        # Site and probability were chosen by cross-validation within these prompts (docs/results/steering.md).
        condition=dict(
            data=prompts | dict(balance="label", limit=520), target=0, values=(1,), gate=dict(site=7, least=0.7)
        ),
    )


def own(name):
    """The sentiment world of this name, with held-out texts."""
    parts = sentiment.world(name)
    held = sentiment.held_out(parts["train"], limit=8 if name == "tiny" else 48)
    return parts | dict(calibrate=dict(data=held, tokens=24, prompt=4))


WORLDS = dict(
    bundled=lambda: own("bundled"),
    gemma=gemma,
    toxicity=toxicity,
    others=lambda: toxicity(0, {}),
    tiny=lambda: own("tiny"),
)


def arms(arg, condition):
    fit, levels = of_world(FIT, arg), LEVELS[arg]
    chosen = {} if arg == "others" else SELECTIONS
    operators = ("add",) if arg in ("others", "tiny") else OPERATORS
    if arg == "tiny":
        chosen = dict(generated="generated")
    found = {f"steer_{name}": dict(operator=name, positions="all") for name in operators}
    found |= {f"steer_{name}": dict(positions=where) for name, where in chosen.items()}
    steer = {name: dict(method="steer", fit=fit | more, kl=levels) for name, more in found.items()}
    condition = dict(condition)
    cast = dict(method="cast", kl=levels) | {key: condition.pop(key) for key in ("data",) if key in condition}
    gate = dict(pool="mean", least=1e-6 if arg == "tiny" else 0.5)  # eight texts teach a probe nothing
    gate |= condition.pop("gate", {})
    return steer | dict(cast=cast | dict(fit=fit | dict(field="label", gate=gate) | condition))


def get_config(arg="bundled"):
    parts = of_world(WORLDS, arg)()
    methods = arms(arg, parts.pop("condition", dict(values=(0,))))
    return sentiment.composed("Steering at equal KL", parts, dict(base=dict(filter={}), top_p=dict(), **methods))
