"""Text from a language model under any number of controls.

    python experiments/generate.py --lm=DIRECTORY "The food was" "We waited"
    python experiments/generate.py --lm=runs/demo/pretrain-… --control runs/demo/steer-…=1.5 --file=prompts.txt
    cat prompts.txt | python experiments/generate.py --lm=gpt2 --format=jsonl --out=texts.jsonl
    python experiments/generate.py --lm=DIRECTORY --chat --system="Answer in one word." "How was the food?"

--lm is an LM artifact, a directory in Hugging Face layout, or a hub id. --control PATH=STRENGTH may be repeated;
without =STRENGTH a control acts as it was fitted. Prompts are arguments, or lines of --file, or lines of standard
input; files whose name ends in .jsonl hold one object with "prompt" or "text" a line. --stop TEXT, repeatable, ends a
completion behind the first TEXT. --stream shows each completion while it is written. With --chat each
prompt is the message of a user, behind the system prompt of --system; an object of a .jsonl file may hold "messages"
itself. A control whose rows choose for themselves, such as one of several forms, reads the field that it names of such
an object. --speculate=K lets the LM propose K tokens that controls on logits then judge at once; texts have the same
distribution. With --blank=___ prompts are whole texts whose blanks ___ a masked or a diffusion model fills, each with
--blank_tokens tokens. Bad input ends with one sentence and exit code 2, and --out is then not written.
"""

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from ctg_jax.data import messages
from ctg_jax.learn import infilling
from ctg_jax.mesh import processes
from ctg_jax.run.stage import open_artifact, read_jsonl, write_text
from ctg_jax.stages import sampling, sources, streaming
from ctg_jax.types import InputError
from experiments import cli

# Options of `truncate` that are flags.
FILTERS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram")


def define(fv):
    text, number, whole = flags.DEFINE_string, flags.DEFINE_float, flags.DEFINE_integer
    text("lm", None, "LM artifact, directory in Hugging Face layout, or hub id", flag_values=fv)
    flags.DEFINE_multi_string("control", [], "control artifact, PATH or PATH=STRENGTH; repeatable", flag_values=fv)
    text("file", None, "file of prompts: lines of text, or .jsonl", flag_values=fv)
    text("out", None, "file to write; standard output by default", flag_values=fv)
    flags.DEFINE_enum("format", "text", ["text", "jsonl"], "of the output", flag_values=fv)
    text("root", "runs", "where the import of --lm is recorded", flag_values=fv)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of an LM that is imported", flag_values=fv)
    flags.DEFINE_boolean("chat", False, "prompts are messages of a user, in the LM's chat format", flag_values=fv)
    text("system", None, "system prompt of --chat", flag_values=fv)
    whole("n", 1, "completions of each prompt", flag_values=fv)
    whole("max_new", 20, "new tokens of each completion", flag_values=fv)
    whole("batch", 32, "rows that are decoded at once", flag_values=fv)
    whole("seed", 0, "of sampling", flag_values=fv)
    flags.DEFINE_boolean("greedy", False, "take the likeliest token", flag_values=fv)
    number("temperature", None, "divides the logits", flag_values=fv)
    number("top_p", None, "nucleus sampling", flag_values=fv)
    whole("top_k", None, "the k likeliest tokens", flag_values=fv)
    number("min_p", None, "tokens with at least this share of the likeliest one's probability", flag_values=fv)
    number("typical_p", None, "locally typical sampling", flag_values=fv)
    number("repetition_penalty", None, "CTRL's penalty", flag_values=fv)
    whole("no_repeat_ngram", None, "no n-gram of this size twice", flag_values=fv)
    flags.DEFINE_multi_string("stop", [], "text that ends a completion; repeatable", flag_values=fv)
    whole("speculate", 0, "tokens that are proposed before controls on logits judge them; 0: none", flag_values=fv)
    text("blank", None, "what marks a blank in given texts, which a whole-row model then fills", flag_values=fv)
    whole("blank_tokens", 4, "tokens that are written in place of each --blank", flag_values=fv)
    flags.DEFINE_boolean("stream", False, "show a completion while it is written", flag_values=fv)
    flags.DEFINE_boolean("truncate_first", False, "truncate before the controls, not after them", flag_values=fv)


def main(argv, session):
    fv, arguments = cli.parse(argv, define, __doc__, positional=True)
    if not fv.lm:
        raise InputError("--lm is missing: give an LM artifact, a directory in Hugging Face layout, or a hub id")
    for name in ("n", "max_new", "batch"):
        if fv[name].value < 1:
            raise InputError(f"--{name}={fv[name].value}: expected a whole number of at least 1")
    if fv.stream and (fv.out or fv.format != "text"):
        raise InputError("--stream shows text on standard output: leave out --out and --format=jsonl")
    if "" in fv.stop:
        raise InputError("--stop is empty: give a text that ends a completion")
    if fv.blank is not None:
        for name in ("stream", "chat", "system", "stop", "max_new", "truncate_first"):
            if fv[name].present and fv[name].value is not False:
                raise InputError(f"--{name} has no meaning for texts with blanks: leave it out, or --blank")
    records = read_prompts(arguments, fv.file)
    prompts = [conversation(messages.prompt_of(r), fv.chat, fv.system) for r in records]
    parts = [read_control(text) for text in fv.control]
    lm = sources.language_model(session, fv.lm, fv.dtype)
    filter = {name: fv[name].value for name in FILTERS if fv[name].value is not None}
    controls = [a for a, _ in parts]
    if fv.speculate:
        filter["speculate"] = fv.speculate
    control = sampling.build(lm, controls, [s for _, s in parts], filter, fv.truncate_first)
    model = sampling.opened(lm)
    if fv.blank is None:
        sampling.check_prompts(model[0], model[2], prompts, fv.max_new)
    options = sampling.Options(fv.n, fv.max_new, fv.greedy, fv.batch, fv.seed, tuple(fv.stop))
    cond = sampling.conditions(controls, lm, prompts, records)
    if fv.stream:
        for i, j in itertools.product(range(len(prompts)), range(fv.n)):
            own = {name: values[i : i + 1] for name, values in cond.items()}
            pieces = streaming.stream(*model, prompts[i], control, options, index=(i, j), cond=own)
            show((p.replace("\n", "\\n") for p in itertools.chain([messages.shown(prompts[i])], pieces)), end="\n")
        return
    if fv.blank is None:
        batches = sampling.complete(*model, prompts, control, options, cond=cond)
    else:
        blanks = infilling.Blanks(fv.blank, fv.blank_tokens)
        batches = infilling.fill(*model, prompts, control, options, blanks)
    lines = (shown(row, fv.format) for batch in batches for row in batch)
    if not fv.out:
        show(lines)
        return
    whole = "".join(lines)
    try:
        processes.once(lambda: write_text(Path(fv.out), whole))
    except OSError as e:
        raise InputError(f"--out={fv.out} cannot be written ({e.strerror})") from None


def show(pieces, end=""):
    """Prints pieces of text as they come, in the first process."""
    for piece in itertools.chain(pieces, [end]):
        if processes.first():
            sys.stdout.write(piece)
            sys.stdout.flush()


def shown(row, format):
    """One completion as a line of JSON, or as the prompt and its text on one line."""
    if format == "jsonl":
        keys = ("prompt_id", "sample", "prompt", "messages", "text", "tokens", "logp")
        row = {key: row[key] for key in keys if key in row}
        return json.dumps(row, ensure_ascii=False) + "\n"
    whole = row["text"] if row.get("whole") else row["prompt"] + row["text"]
    return whole.replace("\n", "\\n") + "\n"


def read_prompts(arguments, file):
    """The records of prompts, from the arguments, or a file, or standard input."""
    if arguments and file:
        raise InputError("prompts are given as arguments and by --file: use one of the two")
    if arguments:
        return [{"prompt": text} for text in arguments]
    if file and file.endswith(".jsonl"):
        rows = read_jsonl(Path(file))
        for number, row in enumerate(rows, 1):
            if messages.has_messages(row):
                if wrong := messages.malformed(row["messages"]):
                    raise InputError(f"{file} record {number}: {wrong}")
            elif not isinstance(row.get("prompt", row.get("text")), str):
                raise InputError(f'{file} record {number} has no "prompt" or "text" that is a string')
        return rows
    try:
        lines = Path(file).read_text("utf-8") if file else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(
            f"{file or 'standard input'} cannot be read ({e}): expected UTF-8 text, a prompt a line"
        ) from None
    return [{"prompt": line} for line in lines.split("\n") if line.strip()]


def conversation(prompt, chat, system):
    """A prompt with --chat and --system: messages, or text as it is."""
    if isinstance(prompt, str):
        if system is not None and not chat:
            raise InputError("--system is the system prompt of a conversation: add --chat")
        return messages.asked(prompt, system) if chat and prompt.strip() else prompt
    return messages.under(prompt, system)


def read_control(text):
    """(artifact, strength or None) of PATH or PATH=STRENGTH."""
    path, equals, value = text.rpartition("=")
    if not equals or Path(text).exists():
        return open_artifact(text), None
    try:
        return open_artifact(path), float(value)
    except ValueError as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"--control {text}: the strength {value!r} is not a number") from None


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
