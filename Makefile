# Everything a developer runs. Each target sets up what it needs; `make help` lists them.

PYTHON ?= python3
VENV := .venv
# Torch, transformers and other people's clients live apart, so that the default suite proves itself without them.
REFERENCE_VENV := .venv-reference
# So do trainers, which bring half of what there is for Python.
TRAINERS_VENV := .venv-trainers
# And XLA's compiler for TPUs, beside which JAX would look for one.
TPU_VENV := .venv-tpu
GPU_VENV := .venv-gpu
# What is compiled for which chips: a few that differ most (`ci`), or each model for each chip (`all`).
FAMILIES ?= ci
# What others wrote and stores stand on, an environment each: their packages do not agree with each other.
STORES_VENVS := .venv-stores
# Which are tested, and seconds for the tests of each, after which they are ended.
STORES ?= redis redis-tls chain hf3fs s3 mooncake nixl-posix lmcache aibrix
STORES_LIMIT ?= 300
# What builds the documentation's site.
DOCS_VENV := .venv-docs
# Where pip finds torch without CUDA, unless an index it already uses has such a build.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
# Processes that run the tests side by side, one more than there are cores, as tests wait for processes that they start;
# each test file stays with one of them.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count() + 1)")
# pytest: `make test ARGS="tests/cache -x"`; bench: `make bench ARGS="--json"`.
ARGS ?=

# pip says only what went wrong: warnings of sources that lack a package are not worth a newcomer's attention. Python
# compiles what it imports when it does, not every file of every package.
PIP_INSTALL = -m pip install --quiet --quiet --disable-pip-version-check --no-compile
BUILD_INPUTS := requirements/run.txt pyproject.toml CMakeLists.txt $(shell find src -name '*.cc' -o -name '*.h' -o -name '*.inc')
RUN := $(VENV)/bin/
# And it keeps that, whatever the environment says: to compile JAX again takes each of some hundred processes that tests
# start as long as all else that it does.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo wheel test test-wide test-reference test-clients test-trainers test-tpu-compile test-gpu-compile test-device test-stores fuzz sanitize lint format docs site docs-serve golden bench \
	lock clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: $(VENV)/.stamp  ## Answer from the embedded model: a long prompt twice, then a chat.
	@$(RUN)rootcellar demo

wheel: $(VENV)/.stamp  ## Build dist/rootcellar-*.whl, with the C++ parts for this machine's system.
	@$(RUN)python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

test: $(VENV)/.stamp-dev  ## Run the test suite (ARGS="tests/cache -x" for a part of it).
	@$(RUN)python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-wide: $(VENV)/.stamp-dev  ## Run what `make test` leaves out: other families, whole processes, programs to the end.
	@$(RUN)python -m pytest -m "wide and not long" -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-reference: $(REFERENCE_VENV)/.stamp  ## Compare live with Hugging Face transformers on torch.
	@$(REFERENCE_VENV)/bin/python -m pytest -m reference -n $(WORKERS) --maxprocesses 2 --dist loadfile $(ARGS)

test-clients: $(REFERENCE_VENV)/.stamp  ## Run other people's clients against a server process.
	@$(REFERENCE_VENV)/bin/python -m pytest -m clients $(ARGS)

test-trainers: $(VENV)/.stamp-dev  ## Run other people's trainers over an engine, where they can be installed.
	@$(MAKE) --no-print-directory $(TRAINERS_VENV)/.stamp \
		|| echo "Trainers cannot be installed here (requirements/trainers.txt): what needs them is skipped."
	@$$(test -f $(TRAINERS_VENV)/.stamp && echo $(TRAINERS_VENV) || echo $(VENV))/bin/python -m pytest -rs -m trainers $(ARGS)

test-tpu-compile: $(VENV)/.stamp-dev  ## Compile steps at full size for TPUs, without one (FAMILIES=all: each model for each chip).
	@$(MAKE) --no-print-directory $(TPU_VENV)/.stamp \
		|| echo "libtpu cannot be installed here (requirements/tpu.txt): what needs it is skipped."
	@JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false ROOTCELLAR_TPU_CASES=$(FAMILIES) \
		$$(test -f $(TPU_VENV)/.stamp && echo $(TPU_VENV) || echo $(VENV))/bin/python -m pytest tests/tpu -s -rs -m tpu $(ARGS)

test-gpu-compile: $(VENV)/.stamp-dev  ## Compile the attention kernel for a GPU, without one: registers, shared memory.
	@$(MAKE) --no-print-directory $(GPU_VENV)/.stamp \
		|| echo "triton cannot be installed here (requirements/gpu.txt): what needs it is skipped."
	@$$(test -f $(GPU_VENV)/.stamp && echo $(GPU_VENV) || echo $(VENV))/bin/python -m pytest tests/gpu -s -rs -m gpu $(ARGS)

test-device: $(VENV)/.stamp-dev  ## Check what a GPU or TPU must show, where JAX finds one: tokens, donation, memory, bandwidth.
	@$(RUN)python scripts/device_check.py $(ARGS)

test-stores: $(if $(filter lmcache aibrix,$(or $(STORES),aibrix)),$(REFERENCE_VENV)/.stamp,$(VENV)/.stamp-dev)  ## Run stores on other people's components (STORES="redis s3": these).
	@$(RUN)python tests/store_components/run.py --environments $(STORES_VENVS) --torch $(REFERENCE_VENV) \
		--limit $(STORES_LIMIT) $(STORES) -- $(ARGS)

fuzz: $(VENV)/.stamp-dev  ## Run the long, nightly tests.
	@$(RUN)python -m pytest -m "long and not stores" --timeout 0 $(ARGS)

sanitize: $(VENV)/.stamp-dev  ## Run the attention kernels and the cache core with sanitizers (ARGS="STEPS SEED" for the core).
	@$(RUN)python scripts/sanitize.py $(ARGS)

lint: $(VENV)/.stamp-dev  ## Check format, style, types and the direction of imports.
	@$(RUN)ruff format --check --quiet .
	@$(RUN)ruff check --quiet .
	@$(RUN)mypy
	@$(RUN)lint-imports --no-logo

format: $(VENV)/.stamp-dev  ## Rewrite the sources in the house style.
	@$(RUN)ruff format .
	@$(RUN)ruff check --fix .

docs: $(VENV)/.stamp-dev  ## Write the generated pages of docs/ again, and the site in build/site.
	@$(RUN)python -m rootcellar.config_page > docs/configuration.md
	@$(RUN)python scripts/draw_figures.py
	@$(RUN)python scripts/write_llms.py
	@$(MAKE) --no-print-directory site

site: $(DOCS_VENV)/.stamp  ## Build the documentation's site in build/site.
	@$(DOCS_VENV)/bin/zensical build --clean

docs-serve: $(DOCS_VENV)/.stamp  ## Show the documentation's site while it is written, on port 8000.
	@$(DOCS_VENV)/bin/zensical serve


golden: $(REFERENCE_VENV)/.stamp  ## Write the golden files of tests/ again, from transformers on torch.
	@$(REFERENCE_VENV)/bin/python scripts/make_golden.py

bench: $(VENV)/.stamp  ## Measure prefill, decode and time to first token.
	@$(RUN)rootcellar bench $(ARGS)

lock:  ## Pin the newest versions that pyproject.toml allows (with the oldest Python it supports).
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "make lock needs Python 3.11: make lock PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python $(PIP_INSTALL) pip-tools==7.6.2
	@rm -f requirements/lock.txt requirements/run.txt requirements/reference.txt
	@$(PIP_COMPILE) --extra build --extra dev --extra figure --output-file requirements/lock.txt pyproject.toml
	@$(PIP_COMPILE) --extra build --constraint requirements/lock.txt --output-file requirements/run.txt pyproject.toml
	@$(PIP_COMPILE) --extra reference --extra clients --constraint requirements/lock.txt \
		--output-file requirements/reference.txt pyproject.toml
	@sed -i.orig 's/^\(torch==[0-9.]*\)+cpu$$/\1/' requirements/reference.txt  # any build of that version will do
	@rm -rf requirements/*.orig .venv-lock

PIP_COMPILE = CUSTOM_COMPILE_COMMAND="make lock" .venv-lock/bin/pip-compile --quiet --strip-extras --allow-unsafe \
	--no-annotate --no-emit-index-url --no-emit-find-links --no-emit-trusted-host

clean:  ## Remove everything that can be made again.
	rm -rf $(VENV) $(REFERENCE_VENV) $(TRAINERS_VENV) $(TPU_VENV) $(STORES_VENVS) $(DOCS_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --- The virtual environments -----------------------------------------------------------------------------------------

# What runs rootcellar, and nothing else.
$(VENV)/.stamp: $(BUILD_INPUTS)
	@$(call create_venv,$(VENV))
	@$(VENV)/bin/python $(PIP_INSTALL) -r requirements/run.txt
	@$(call install_rootcellar,$(VENV))

# The same environment with what tests and checks need beside.
$(VENV)/.stamp-dev: $(VENV)/.stamp requirements/lock.txt
	@echo "Adding what tests and checks need ..."
	@$(VENV)/bin/python $(PIP_INSTALL) -r requirements/lock.txt
	@touch $@

# Alone: the site needs nothing of rootcellar.
$(DOCS_VENV)/.stamp: requirements/docs.txt
	@$(call create_venv,$(DOCS_VENV))
	@$(DOCS_VENV)/bin/python $(PIP_INSTALL) -r requirements/docs.txt
	@touch $@

# Torch and the rest on top of what is in $(VENV), which a path file lends: nothing is installed or compiled twice.
$(REFERENCE_VENV)/.stamp: $(VENV)/.stamp-dev requirements/reference.txt
	@$(call create_venv,$(REFERENCE_VENV))
	@$(call lend,$(REFERENCE_VENV))
	@torch=$$(grep '^torch==' requirements/reference.txt); \
		$(REFERENCE_VENV)/bin/python $(PIP_INSTALL) "$$torch+cpu" 2>/dev/null \
		|| $(REFERENCE_VENV)/bin/python $(PIP_INSTALL) --extra-index-url $(TORCH_INDEX) "$$torch"
	@$(REFERENCE_VENV)/bin/python $(PIP_INSTALL) -r requirements/reference.txt
	@touch $@ && echo "$(REFERENCE_VENV) is ready."

# The same for trainers.
$(TRAINERS_VENV)/.stamp: $(VENV)/.stamp-dev requirements/trainers.txt
	@$(call create_venv,$(TRAINERS_VENV))
	@$(call lend,$(TRAINERS_VENV))
	@$(TRAINERS_VENV)/bin/python $(PIP_INSTALL) --no-deps -r requirements/trainers.txt
	@touch $@ && echo "$(TRAINERS_VENV) is ready."

# The same for the compilers.
$(TPU_VENV)/.stamp: $(VENV)/.stamp-dev requirements/tpu.txt
	@$(call create_venv,$(TPU_VENV))
	@$(call lend,$(TPU_VENV))
	@$(TPU_VENV)/bin/python $(PIP_INSTALL) --no-deps -r requirements/tpu.txt
	@touch $@ && echo "$(TPU_VENV) is ready."

$(GPU_VENV)/.stamp: $(VENV)/.stamp-dev requirements/gpu.txt
	@$(call create_venv,$(GPU_VENV))
	@$(call lend,$(GPU_VENV))
	@$(GPU_VENV)/bin/python $(PIP_INSTALL) --no-deps -r requirements/gpu.txt
	@touch $@ && echo "$(GPU_VENV) is ready."

define lend
$(1)/bin/python -c 'import pathlib, sysconfig; \
	here = sysconfig.get_path("purelib"); lent = here.replace("$(1)", "$(VENV)"); \
	pathlib.Path(here, "lent.pth").write_text(f"import site; site.addsitedir({lent!r})\n")'
endef

define create_venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "rootcellar needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
if test -e $(1)/.stamp; then echo "Bringing $(1) up to date ..."; \
else echo "Setting up $(1) (once; it takes a minute or a few) ..."; fi; \
$(PYTHON) -m venv $(1)
endef

# The build's own tools are pinned with the rest, so nothing is fetched for an isolated build.
define install_rootcellar
$(1)/bin/python $(PIP_INSTALL) --no-build-isolation --no-deps --editable . && \
{ ls $(1)/lib/python*/site-packages/rootcellar/cache/_core*.so $(1)/lib/python*/site-packages/rootcellar/ops/_native.so \
	$(1)/lib/python*/site-packages/rootcellar/pools/_copies.so >/dev/null 2>&1 \
	|| echo "Note: installed without some of the C++ parts (no C++ compiler, no Python headers, or" \
	"ROOTCELLAR_NO_NATIVE=1): Python does the cache core's work, JAX that of attention and of copying pages."; } && \
touch $(1)/.stamp && echo "$(1) is ready."
endef
