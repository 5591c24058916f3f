"""GeDi, self-debiasing and a formula of three models as their authors write them in PyTorch: one call of `transformers`
for each model and for each token, a loop in Python, and the authors' arithmetic. `decoding_control.py` and
`accelerator_sections.py` time them beside ours."""

import jax
import jax.numpy as jnp
import numpy as np

from ctg_jax import Prompts, methods, rng
from ctg_jax.controls.streams import Stream

DESCRIPTION = 10  # tokens that a stream reads before the prompt
FORMULA = dict(formula="1.5 * M - 0.4 * (A | M) + 0.3 * B", tuned=("A", "B"), adapter={"rank": 2})


def formula(lm, key):
    return methods.get("arithmetic").init(lm, key, **FORMULA)


def streams(control):
    leaves = jax.tree.leaves(control, is_leaf=lambda x: isinstance(x, Stream))
    return [x for x in leaves if isinstance(x, Stream)]


def prompts_for(control, tokens):
    """Prompts with what the streams of a control read in their place."""
    cond, generator, most = {}, np.random.default_rng(1), int(tokens.max()) + 1
    for stream in streams(control):
        if stream.own is not None:
            size = (len(tokens), *(() if stream.copies is None else (stream.copies,)), DESCRIPTION)
            head = generator.integers(0, most, size)
            body = tokens if stream.copies is None else np.repeat(tokens[:, None], stream.copies, axis=1)
            cond[stream.own] = jnp.asarray(head if stream.before else np.concatenate([head, body], -1), jnp.int32)
    keys = rng.per_example(jax.random.key(1), jnp.arange(len(tokens)))
    return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), keys, cond)


def authors_way(torch, model, inputs, combine, new):
    """Greedy decoding by one call of a model for each of `inputs`, ids [rows, T], and for each new token.

    combine: logits of the last position of every call -> logits [B, V]. The rows of an input may be a multiple of B.
    """
    caches, made = [None] * len(inputs), []
    with torch.no_grad():
        for _ in range(new):
            outs = [model(input_ids=x, past_key_values=c, use_cache=True) for x, c in zip(inputs, caches)]
            caches = [out.past_key_values for out in outs]
            token = combine([out.logits[:, -1] for out in outs]).argmax(-1)
            made.append(token)
            inputs = [token.repeat(len(x) // len(token))[:, None] for x in inputs]
    return torch.stack(made, 1)


def references(torch, tokens):
    """Method -> (inputs of the calls, what combines their logits), with the authors' arithmetic, for one text: GeDi's
    sums up the likelihood of what was written."""
    ids, most = torch.as_tensor(tokens, dtype=torch.long), int(tokens.max()) + 1
    described = torch.cat([torch.randint(0, most, (2 * len(ids), DESCRIPTION)), ids.repeat(2, 1)], 1)
    coded = torch.cat([torch.full((2 * len(ids), 2), 7), ids.repeat(2, 1)], 1)
    total = torch.zeros(2 * len(ids), 1)

    def debiased(z):
        worse = z[0].softmax(-1) - torch.stack(z[1].softmax(-1).chunk(2)).amax(0)
        return z[0].log_softmax(-1) + torch.where(worse < 0, (50 * worse).exp(), torch.ones(())).clamp_min(0.01).log()

    def gedi(z):
        nonlocal total
        heard = total + z[1].log_softmax(-1)
        good = torch.stack(heard.chunk(2)).log_softmax(0)[0]
        weighed = z[0].log_softmax(-1) + 30 * good
        chosen = weighed.argmax(-1, keepdim=True)
        total = heard.gather(1, chosen.repeat(2, 1))
        return weighed

    def formula(z):
        m, a, b = (x.log_softmax(-1) for x in z)
        return (1.5 * m - 0.4 * torch.maximum(a, m) + 0.3 * b).log_softmax(-1)

    return {
        "self_debias": ([ids, described], debiased),
        "gedi": ([ids, coded], gedi),
        "arithmetic": ([ids, ids, ids], formula),
    }
