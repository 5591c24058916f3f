"""ctg_jax: controllable text generation with one frozen language model and many small controls."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [  # what `make demo` and every experiment of `configs/` on the bundled reviews need
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "etils[epath]>=1.12",  # roots in an object store
    "transformers>=5,<6",  # tokenizers only: it has no Flax models
    "tokenizers>=0.22",
    "huggingface-hub>=1",
    "safetensors>=0.6",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib-resources",  # tensorflow-datasets 4.9.10 needs it and does not declare it
    "array-record>=0.8",  # the file format of the bundled reviews
    "pyarrow>=17",  # samples of the methods that learn from a reward
    "grain>=0.2.15,<0.3",
    "ml-collections>=1.1",
    "absl-py>=2",
    "numpy>=2.0",
    "scipy>=1.14",
    "scikit-learn>=1.5",
    "matplotlib>=3.9",
    "jinja2>=3.1.6",  # the sandbox of chat templates: earlier ones could be escaped from
    "tqdm>=4.66",
]
EXTRAS = {
    "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "data": ["datasets>=4"],  # hf:NAME
    "metrics": ["sacrebleu>=2.5", "mauve-text>=0.4", "nltk>=3.9"],  # BLEU, MAUVE, coverage of keywords
    "form": ["outlines-core>=0.2.11,<0.3"],  # constraints of form: regular expressions and JSON schemas
    "gguf": ["gguf>=0.17"],  # control vectors of repeng and llama.cpp
    "tensorboard": ["tensorboardX>=2.6"],  # --tensorboard
    "wandb": ["wandb>=0.19"],  # --wandb
    "gs": ["gcsfs>=2025.1"],  # --root=gs://…
    "s3": ["s3fs>=2025.1"],  # --root=s3://…
    "slurm": ["submitit>=1.5"],  # grids on a cluster: experiments/ablate.py --slurm
    "notebook": ["jupyterlab>=4", "nbconvert>=7", "nbclient>=0.10", "treescope>=0.1.9", "pandas>=2.2"],
    "parity": ["torch>=2.6"],  # reference models in tests and benchmarks
    "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30", "mkdocs>=1.6,<2"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.12",
        "nbclient>=0.10",  # with ipykernel and pandas: the long tests run the notebooks
        "ipykernel>=6",
        "pandas>=2.2",
        "outlines-core>=0.2.11,<0.3",
        "gguf>=0.17",
    ],
}
# A wheel carries the scripts and configurations of the command `ctg` inside the package; see ctg_jax/door/command.py.
SCRIPTS = {"ctg_jax._scripts.experiments": "experiments", "ctg_jax._scripts.configs": "configs"}
# Of all features: the extra `all`.
FEATURES = ["data", "metrics", "form", "gguf", "tensorboard", "wandb", "gs", "s3", "slurm", "notebook"]

setup(
    name="ctg_jax",
    version="0.1.0",
    description="Controllable text generation in JAX/Flax: one frozen language model, many small controls.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["ctg_jax", "ctg_jax.*"]), *SCRIPTS],
    package_dir=SCRIPTS,
    entry_points={"console_scripts": ["ctg = ctg_jax.door.command:main"]},
    package_data={"ctg_jax.data": ["*.json", "*.txt"]},
    install_requires=CORE,
    extras_require={**EXTRAS, "all": sorted({name for extra in FEATURES for name in EXTRAS[extra]})},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
