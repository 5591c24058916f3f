"""The front door: text in, text out, and controls from lists of texts.

    import ctg_jax as ctg
    lm = ctg.load("google/gemma-3-270m")
    cheerful = ctg.steer.from_pairs(lm, [("I feel great", "I feel awful"), …])
    print(lm.write(["The weather today"], control=2 * cheerful, max_new=30, stop=["."], seed=0))
    cheerful.save("cheerful")

It is a room of its own above all others, because it calls the stages that experiments call and holds no second way of
doing anything: `load` is the stage `load_lm`, `from_pairs` writes the texts to a file and calls the `fit` of the
method, and `write` calls `sampling.complete`. So what was fitted once is found again, and a control that is saved here
is an artifact like any other, which `--control` of the scripts reads. `import ctg_jax` does not import this room; its
names are looked up when they are first used.
"""

from ctg_jax.door.calibrate import Calibrated, calibrate
from ctg_jax.door.choose import Choice, choose
from ctg_jax.door.mix import Mix, load_control
from ctg_jax.door.model import Model, Written, load

__all__ = ["Calibrated", "Choice", "Mix", "Model", "Written", "calibrate", "choose", "load", "load_control"]
