"""A hook of mkdocs that makes pages of the site while it is built, so that nothing is written twice.

The home page comes from README.md; the page of a method from its docstrings, its functions, its configuration,
RESULTS.md and docs/results; the laws from their tests; the reference from the package; notebooks and scripts from
themselves; how to cite from CITATION.cff.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import re
import textwrap
import tokenize
from pathlib import Path

import yaml
from markdown.extensions.toc import slugify
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
METHODS = {p.stem: p for p in sorted((ROOT / "ctg_jax" / "methods").glob("*/*.py")) if p.stem != "__init__"}
PLACES = {"RESULTS.md": "results.md", "CITATION.cff": "cite.md"}
RECORD = ROOT / "docs" / "results"  # the complete record of measurements, a page for each theme
GUIDES = {  # pages in docs/
    "How to": "how_to.md",
    "Glossary of figures": "glossary.md",
    "Models": "models.md",
    "Chat models": "chat.md",
    "Worlds": "worlds.md",
    "Evaluation without a service": "offline_evaluation.md",
    "Beside other libraries": "peers.md",
    "Scripts": "scripts.md",
}
INSIDE = {
    "Design": "design.md",
    "A new method": "new_method.md",
    "Settings of the papers": "paper_settings.md",
    "Laws": "laws.md",
    "Silent faults": "faults.md",
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LISTS = {"from_pairs", "from_texts"}  # functions of a method that learn from lists
LM = "google/gemma-3-270m"  # the language model of the examples
DIFFERS = re.compile(r"(?<![:`])\b(papers?|authors?)\b")  # `:paper` is an argument of configurations


def on_config(config):
    """The navigation over the pages in docs/ and those that `pages` makes."""
    made = pages()
    methods = [{Path(p).stem: p} for p in made if p.startswith("methods/") and p != "methods/index.md"]
    reference = [{Path(p).stem.removeprefix("ctg_jax."): p} for p in made if p.startswith("api/")]
    config.nav = [
        {"Home": "index.md"},
        {"Methods": ["methods/index.md", *methods]},
        {"Notebooks": [{titled(p): f"notebooks/{f.stem}.md"} for f, p in zip(NOTEBOOKS, map(first_cell, NOTEBOOKS))]},
        {"Guides": [{title: path} for title, path in GUIDES.items()]},
        {"Inside": [{title: path} for title, path in INSIDE.items()]},
        {"Results": ["results.md", *({titled(p.read_text("utf-8")): f"results/{p.name}"} for p in record())]},
        {"Reference": reference},
        {"How to cite": "cite.md"},
    ]
    return config


def on_files(files: Files, config) -> Files:
    """The files of docs/ and the pages that are made."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for path, picture in pictures().items():
        files.append(File.generated(config, path, content=picture))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Changes links from docs/results to RESULTS.md into links to its page in the site."""
    return markdown.replace("](../../RESULTS.md)", "](../results.md)")


def pages() -> dict[str, str]:
    """Path in the site -> Markdown, of every page that is made."""
    readme, results = (linked((ROOT / name).read_text("utf-8")) for name in ("README.md", "RESULTS.md"))
    measurements = {"results.md": results, **{f"results/{p.name}": p.read_text("utf-8") for p in record()}}
    names = sorted(METHODS)
    table = section(readme, "Methods").split("\nRecipes:")[0]
    for name in names:
        readme = readme.replace(f"\n| `{name}` |", f"\n| [`{name}`](methods/{name}.md) |")
        table = table.replace(f"\n| `{name}` |", f"\n| [`{name}`]({name}.md) |")
    made = {
        "index.md": readme,
        "results.md": results,
        "laws.md": laws(),
        "cite.md": cite(table.replace("](", "](methods/")),
        "methods/index.md": f"# Methods\n{table}",
    }
    made |= {f"methods/{name}.md": method(name, measurements) for name in names}
    made |= {f"notebooks/{file.stem}.md": notebook(file) for file in NOTEBOOKS}
    made["scripts.md"] = scripts()
    for module in modules():
        made[f"api/{module}.md"] = f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n"
    return made


def linked(text: str) -> str:
    """Links of a file in the root of the checkout as links of a page in the root of the site."""
    for here, there in PLACES.items():
        text = text.replace(f"]({here})", f"]({there})").replace(f"[{here}]", f"[{Path(there).stem}]")
    text = re.sub(r"\[[^]]*\]\(notebooks\)", f"[notebooks](notebooks/{NOTEBOOKS[0].stem}.md)", text)
    return plain(re.sub(r"\]\(docs/", "](", text).replace("[docs/", "["))


def plain(text: str) -> str:
    """Badges as links of words, so that the site fetches nothing from elsewhere."""
    return re.sub(r"\[!\[([^]]*)\]\([^)]*\)\]\(([^)]*)\)", r"[\1](\2)", text)


def section(text: str, heading: str) -> str:
    """The text under a heading of the second level."""
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def record() -> list[Path]:
    return sorted(RECORD.glob("*.md"))


def titled(text: str) -> str:
    """The heading of the first level of a page."""
    return text.split("\n", 1)[0].removeprefix("# ")


def method(name: str, measurements: dict[str, str]) -> str:
    """The page of a method: docstring, known differences, measurements, configuration and reference."""
    place = METHODS[name].relative_to(ROOT)
    source = METHODS[name].read_text("utf-8")
    about = ast.get_docstring(ast.parse(source))
    parts = [f"# {name}", about, "## Usage", usage(name, ast.parse(source))]
    file = ROOT / "configs" / f"{name}.py"
    config = file.read_text("utf-8") if file.exists() else ""
    if not config:
        uses = [p for p in sorted(file.parent.glob("*.py")) if f'method="{name}"' in p.read_text("utf-8")]
        file, config = (uses[0], uses[0].read_text("utf-8")) if uses else (file, "")
    differences = [*remarks(source, str(place)), *remarks(config, f"configs/{file.name}")]
    parts += [
        "## Known differences from the paper and the authors' code",
        "\n".join(differences) or "None is recorded.",
    ]
    parts += ["## Results", measured(name, about, measurements)]
    if config:
        parts += ["## Configuration", f"`configs/{file.name}`", f"```python\n{config.strip()}\n```"]
    parts.append("## Reference")
    options = "\n    options:\n      heading_level: 3\n      show_root_full_path: false"
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            parts.append(f"::: {'.'.join(place.with_suffix('').parts)}.{node.name}{options}")
    return "\n\n".join(parts) + "\n"


def usage(name: str, tree: ast.Module) -> str:
    """How a method is used, from the functions that its file has."""
    functions = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    listed = {
        x.id for node in tree.body if isinstance(node, ast.Assign) for x in ast.walk(node) if isinstance(x, ast.Name)
    }
    required = {
        f: [a.arg for a, default in zip(args.kwonlyargs, args.kw_defaults) if default is None]
        for f, args in functions.items()
    }
    if LISTS & listed:
        labels = "" if name == "finetune" else ", labels"
        fits = [f"control = ctg.{name}.from_texts(lm, texts{labels})"]
        fits += ["# or, from pairs of texts: " + f"ctg.{name}.from_pairs(lm, pairs)"] if "from_pairs" in listed else []
    elif "fit" in functions:
        asked = [f"--set {s}=…" for s in required["fit"] if s not in ("lm", "data", "rewards")]
        asked += ["--reward mine.py:score"] if "rewards" in required["fit"] else []
        shell = f"ctg fit {name} {' '.join([f'--lm={LM} --data=jsonl:texts.jsonl', *asked])} --out=mine\n"
        shell += f'ctg write "The weather today" --lm={LM} --control mine'
        return _fenced("bash", f"{shell}\nctg run --config={name}.py:tiny") + _settings("fit")
    elif "make" in functions:
        given = [f"{s}=…" for s in required["make"] if s != "tokenizer"]
        names = [a.arg for a in functions["make"].kwonlyargs]
        given = ["tokenizer=lm.tokenizer", *given] if "tokenizer" in names else given
        fits = [f"control = ctg.{name}.make({', '.join(['lm.lm', 'jax.random.key(0)', *given])})"]
    else:
        text = f'import ctg_jax as ctg\n\nlm = ctg.load("{LM}")\nprint(lm.write(["The weather today"], top_p=0.9))'
        return _fenced("python", text)
    jax = "import jax\n\n" if "jax." in fits[0] else ""
    strong = "2 * control" if LISTS & listed else "control"
    lines = [f"{jax}import ctg_jax as ctg\n", f'lm = ctg.load("{LM}")', *fits]
    lines.append(f'print(lm.write(["The weather today"], control={strong}, max_new=30, seed=0))')
    return _fenced("python", "\n".join(lines)) + _settings("fit" if "fit" in functions else "make")


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _settings(function: str) -> str:
    return f"\n\nThe settings are those of `{function}` and of the stages that it names; see the reference below."


def first_cell(file: Path) -> str:
    return "".join(json.loads(file.read_text("utf-8"))["cells"][0]["source"])


def notebook(file: Path) -> str:
    """A notebook as a page: text, code, and what the code printed and drew."""
    parts, drawn = [], 0
    for cell in json.loads(file.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(plain(text) if cell["cell_type"] == "markdown" else _fenced("python", text))
        for out in cell.get("outputs", []):
            if "image/png" in out.get("data", {}):
                parts.append(f"![output]({file.stem}-{drawn}.png)")
                drawn += 1
            else:
                found = out.get("text") or out["data"].get("text/plain", "")
                parts.append(_fenced("text", "".join(found).rstrip("\n")))
    return "\n\n".join(parts) + "\n"


def pictures() -> dict[str, bytes]:
    """Path in the site -> PNG, of the pictures that notebooks keep."""
    found = {}
    for file in NOTEBOOKS:
        outputs = [o for c in json.loads(file.read_text("utf-8"))["cells"] for o in c.get("outputs", [])]
        drawn = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
        found |= {f"notebooks/{file.stem}-{i}.png": base64.b64decode("".join(png)) for i, png in enumerate(drawn)}
    return found


def scripts() -> str:
    """What every script of `experiments/` says of itself."""
    parts = [
        "# Scripts",
        "In a checkout `python experiments/FILE.py` runs each of them. `ctg --help` lists those that are installed. "
        "`ctg write` is generate.py, `ctg run` main.py and `ctg report` collect.py; the others are named as files.",
    ]
    for file in sorted((ROOT / "experiments").glob("**/*.py")):
        source = file.read_text("utf-8")
        if "__main__" in source:
            parts += [f"## {file.relative_to(ROOT / 'experiments')}", ast.get_docstring(ast.parse(source)) or ""]
    return "\n\n".join(parts) + "\n"


def remarks(source: str, file: str) -> list[str]:
    """The sentences in docstrings and comments of a file that mention the paper or its authors, as list items."""
    if not source:
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            where = "" if isinstance(node, ast.Module) else f", `{node.name}`"
            blocks = re.split(r"\n\s*\n|\n(?=\s*\w+(?:, \w+)*: )", text)
            found += [(where, " ".join(block.split())) for block in blocks]
    run: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            run.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE) and run:
            found, run = [*found, ("", " ".join(run))], []
    items = []
    for where, text in found:
        kept = [s for s in re.split(r"(?<=[.;])\s+(?=[A-Z(`])", text) if DIFFERS.search(s)]
        if kept:
            items.append(f"- {' '.join(kept)} (`{file}`{where})")
    return items


def measured(name: str, about: str, measurements: dict[str, str]) -> str:
    """The rows of RESULTS.md that bear the method's name, with their header, and links to all sections that mention it.

    measurements: RESULTS.md and the pages of docs/results, by their paths in the site.
    """
    title = re.split(r"[:(,]| as | against ", about)[0].strip()
    word = re.compile(rf"\b({re.escape(name)}|{re.escape(title)})\b", re.IGNORECASE)
    parts, findings, full = [], [], []
    for path, page in measurements.items():
        for text in re.split(r"\n(?=## )", page)[1:]:
            heading = text.splitlines()[0].removeprefix("## ")
            link = f"[{heading}](../{path}#{slugify(heading, '-')})"
            rows = own_rows(text, name) if path == "results.md" else []
            if rows:
                parts.append(f"From {link}:\n\n" + "\n".join(rows))
            elif word.search(text):
                (findings if path == "results.md" else full).append(f"- {link}")
    if findings:
        parts.append("The method is also mentioned in\n\n" + "\n".join(findings))
    if full:
        parts.append("Complete record:\n\n" + "\n".join(full))
    return "\n\n".join(parts) or "Nothing was recorded yet."


def own_rows(text: str, name: str) -> list[str]:
    """The first table of a section that has rows of the method: header and those rows."""
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        header, line, *rows = table.strip().splitlines()
        own = [row for row in rows if re.fullmatch(rf"{name}(_\w+)?", row.split("|")[1].strip())]
        if own:
            return [header, line, *own]
    return []


def laws() -> str:
    """The tests of tests/laws as statements with their proofs."""
    source = (ROOT / "tests" / "laws" / "test_laws.py").read_text("utf-8")
    tree = ast.parse(source)
    parts = ["# The laws", ast.get_docstring(tree), "Each is a test; the name of the test is the law."]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            statement = node.name.removeprefix("test_").replace("_", " ")
            code = textwrap.dedent(ast.get_source_segment(source, node))
            parts += [f"## {statement[0].upper()}{statement[1:]}", f"```python\n{code}\n```"]
    return "\n\n".join(parts) + "\n"


def modules() -> list[str]:
    """The modules of the package that have a page in the reference. Methods have pages of their own."""
    files = sorted((ROOT / "ctg_jax").rglob("*.py"))
    dotted = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files]
    return [m for m in dotted if not m.startswith("ctg_jax.methods.")]


def cite(table: str) -> str:
    """How to cite, from CITATION.cff."""
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    authors = " and ".join(a.get("name") or f"{a['family-names']}, {a['given-names']}" for a in facts["authors"])
    year = str(facts["date-released"])[:4]
    entry = {"title": facts["title"], "author": f"{{{authors}}}", "version": facts["version"], "year": year}
    fields = "".join(f"  {key:<7} = {{{value}}},\n" for key, value in entry.items())
    return (
        f"# How to cite\n\n{facts['message']}\n\n```bibtex\n@software{{ctg_jax,\n{fields}}}\n```\n\n"
        f"## The papers\n{table}"
    )
