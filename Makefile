PY ?= python3
V := .venv
PYTHON := $(V)/bin/python
# Without compiled bytecode every start of JAX takes three times as long, and uv does not write it.
export PYTHONDONTWRITEBYTECODE :=
export HF_HUB_OFFLINE ?= 1

.PHONY: test nightly demo docs bench-accelerator lint lock parity clean

# The tests compile thousands of small programs and run each for milliseconds, so what compiles fastest is fastest:
# without LLVM's optimisations, with XLA's older code for fusions, in one piece. `make nightly` compiles as users do. XLA
# refuses flags that it does not know; these are known to the version in requirements.lock.
QUICK := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
test: export XLA_FLAGS ?= $(QUICK)
test: $(V)/.ok $(V)/.parity ## the default suite, with the parity tests
	$(PYTHON) -m pytest -q -n 2 --dist loadfile tests

nightly: $(V)/.ok $(V)/.parity ## everything, the long ones too
	$(PYTHON) -m pytest -q -n 2 --dist loadfile tests --slow

demo: $(V)/.ok ## the main job on the bundled corpus; ends with the path of report.html
	$(PYTHON) experiments/compare.py --config=configs/compare_sentiment.py --root=runs/demo

bench-accelerator: ## what one accelerator gives, within nine minutes, with the packages of a bare CUDA image
	$(PY) experiments/benchmarks/accelerator.py

docs: $(V)/.ok ## the site, in build/site
	NO_MKDOCS_2_WARNING=1 $(V)/bin/mkdocs build --strict
	@echo build/site/index.html

lint: $(V)/.ok
	$(V)/bin/ruff check . && $(V)/bin/ruff format --check .

$(V)/.ok: requirements.lock
	$(PY) -m venv $(V)
	$(V)/bin/pip install -q uv==0.13.9 || true
	$(V)/bin/uv pip install -q --compile-bytecode --python $(PYTHON) -r requirements.lock || $(V)/bin/pip install -q -r requirements.lock
	$(V)/bin/uv pip install -q --python $(PYTHON) --no-deps -e . || $(V)/bin/pip install -q --no-deps -e .
	touch $@

# The reference models of the parity tests run on the CPU build of PyTorch; tests that need it skip without it.
$(V)/.parity: $(V)/.ok
	$(V)/bin/pip install -q torch==2.13.0 || echo "PyTorch could not be installed: the parity tests will be skipped"
	touch $@

lock: $(V)/.ok ## writes requirements.lock from setup.py: the extras that the tests and the site need
	$(V)/bin/uv pip compile -q --universal --python-version 3.11 setup.py --extra data --extra metrics --extra tensorboard --extra slurm --extra dev --extra docs -o requirements.lock

clean:
	rm -rf $(V) runs build dist *.egg-info
