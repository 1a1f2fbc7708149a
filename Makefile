# tinydpo: `make` lists the targets. Each one runs a command that it prints first.
RECIPE     ?= recipes/gpt2-medium-hh
ACCELERATE ?= accelerate_configs/$(if $(shell command -v nvidia-smi),single_gpu,cpu).yaml
ARGS       ?=
# A name for a run with changed numbers, and for its evaluation: make dpo NAME=beta03 ARGS="--beta 0.3"
NAME       ?=
# What differs between the machines of one run: "--machine_rank 1 --main_process_ip 10.0.0.1" (docs/scaling.md)
NODE       ?=
SEED       ?= 0
ROUNDS     ?= 2
PYTHON     := .venv/bin/python
NEWEST     := .venv-newest/bin/python
FAST       := -m 'not slow' -n auto --maxprocesses 4 --dist loadfile
RUNS        = runs/$(notdir $(RECIPE))

ifneq ($(and $(NAME),$(filter frontier pairs round inspect,$(MAKECMDGOALS))),)
$(error NAME is for sft, dpo, reward, merge, evaluate, winrate and playground)
endif
ifeq ($(wildcard $(ACCELERATE)),)
$(error ACCELERATE=$(ACCELERATE): there is no such file, see accelerate_configs/)
endif
# The cores of this machine, shared out among its processes.
PROCESSES   = $(or $(shell sed -n 's/^num_processes: *\([0-9]*\).*/\1/p' $(ACCELERATE)),1)
THREADS     = $(shell expr $$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) \* $(or $(MACHINES),1) / $(PROCESSES) \| 1)
WAITING     = The launcher waits until all $(MACHINES) machines run this command, each with its --machine_rank in NODE.
LAUNCH      = $(if $(MACHINES),$(info $(WAITING))).venv/bin/accelerate launch --quiet --num_cpu_threads_per_process $(THREADS) --config_file $(ACCELERATE) $(NODE)
TRAIN       = --config $(RECIPE)/$(STAGE).yaml --accelerate_config $(ACCELERATE) $(if $(NAME),--output_dir $(RUNS)/$(NAME)) $(ARGS)
POLICY      = $(if $(NAME),--model_name_or_path $(RUNS)/$(NAME) --output_dir $(RUNS)/$(subst evaluate,evaluation,$(STAGE))-$(NAME))
# DeepSpeed is installed for the accelerate files that ask for it.
LAUNCHER   := $(if $(shell grep -s DEEPSPEED $(ACCELERATE)),.venv/deepspeed,install)
MACHINES   := $(filter-out 1,$(shell sed -n 's/^num_machines: *\([0-9]*\).*/\1/p' $(ACCELERATE)))
INSTALL     = $(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# The recipe file of each target: $(RECIPE)/$(STAGE).yaml
sft inspect:         STAGE = sft
dpo:                 STAGE = dpo
reward:              STAGE = reward
evaluate playground: STAGE = evaluate
frontier:            STAGE = frontier
pairs:               STAGE = pairs
winrate:             STAGE = winrate
merge:               STAGE = dpo-lora

.DEFAULT_GOAL := help
.PHONY: help install quickstart sft dpo reward merge pairs round evaluate frontier winrate report playground
.PHONY: inspect bench speedrun test test-all test-gpu test-newest lint clean

help: ## List every target
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12
	@echo 'Change what runs: RECIPE=recipes/quickstart STAGE=dpo-512 ACCELERATE=accelerate_configs/multi_gpu.yaml'
	@echo '                  NAME=beta03 ARGS="--beta 0.3 --max_steps 50"; now: RECIPE=$(RECIPE) ACCELERATE=$(ACCELERATE)'

install: .venv/installed ## Create .venv and install; again only when pyproject.toml or constraints.txt changed

.venv/installed: pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: tinydpo needs Python 3.11 or newer")'
	test -x $(PYTHON) || python3 -m venv .venv
	$(INSTALL) '.[dev]'
	@touch $@

.venv/judge .venv/playground .venv/browser .venv/deepspeed: .venv/installed
	$(INSTALL) '.[$(@F)]'
	@touch $@

quickstart: install ## SFT, DPO and evaluation on the toy task, on a CPU in minutes (SEED=1 for another)
	$(PYTHON) scripts/quickstart.py --seed $(SEED) --output_dir runs/quickstart$(if $(filter-out 0,$(SEED)),-seed$(SEED))

sft: $(LAUNCHER) ## Fine-tune the recipe's model on the preferred answers
	$(LAUNCH) scripts/sft.py $(TRAIN)

dpo: $(LAUNCHER) ## Preference-tune it with DPO (trains the SFT model first if it is missing)
	$(LAUNCH) scripts/dpo.py $(TRAIN)

reward: $(LAUNCHER) ## Train a reward model on the same pairs, to compare the implicit reward with
	$(LAUNCH) scripts/reward.py $(TRAIN)

pairs: install ## The policy's own answers, scored and paired: on-policy data for `make dpo`
	$(PYTHON) scripts/sample_pairs.py --config $(RECIPE)/$(STAGE).yaml $(ARGS)

round: install ## On-policy rounds (ROUNDS=2): pairs, DPO, evaluation, and a table
	$(PYTHON) scripts/round.py --recipe $(RECIPE) --rounds $(ROUNDS) $(ARGS)

merge: install ## Put a LoRA adapter into its base's weights: a plain checkpoint
	$(PYTHON) scripts/merge.py --model_name_or_path $(RUNS)/$(or $(NAME),$(STAGE)) --output_dir $(RUNS)/$(or $(NAME),$(STAGE))-merged $(ARGS)

evaluate: install ## Compare the policy with its reference: pairs, sampled answers, KL
	$(PYTHON) scripts/evaluate.py --config $(RECIPE)/$(STAGE).yaml $(POLICY) $(ARGS)

frontier: install ## Reward against KL over losses and betas: the paper's Figure 2
	$(PYTHON) scripts/frontier.py --config $(RECIPE)/$(STAGE).yaml $(ARGS)

winrate: .venv/judge ## Win rates by a judge behind an OpenAI-compatible endpoint
	$(PYTHON) scripts/winrate.py --config $(RECIPE)/$(STAGE).yaml $(POLICY) $(ARGS)

report: install ## Everything measured so far on one page, runs/<recipe folder>/report.html
	$(PYTHON) scripts/report.py $(RUNS) $(ARGS)

playground: .venv/playground ## Talk to reference and policy side by side in the browser, and vote
	$(PYTHON) scripts/playground.py --config $(RECIPE)/$(STAGE).yaml $(POLICY) $(ARGS)

inspect: install ## See what the token budget does to the pairs, before training
	$(PYTHON) scripts/inspect_data.py --config $(RECIPE)/$(STAGE).yaml $(ARGS)

bench: install ## Compare speed and memory of training with plain TRL's
	$(PYTHON) benchmarks/throughput.py $(ARGS)

speedrun: install ## SFT, DPO and evaluation against the clock
	$(PYTHON) benchmarks/speedrun.py $(ARGS)

test: install ## Run the tests (minutes)
	$(PYTHON) -m pytest $(FAST) $(ARGS)

# PyTorch stays at its pin: each build is gigabytes.
test-newest: ## Run them with the newest libraries that pyproject.toml admits, in .venv-newest
	test -x $(NEWEST) || python3 -m venv .venv-newest
	$(NEWEST) -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		--editable '.[dev]' $(shell grep ^torch== constraints.txt)
	@$(NEWEST) -m pip list --format=freeze | awk -F '==|[+]' 'NR == FNR { pin[$$1] = $$2; next } \
		$$1 in pin && $$2 != pin[$$1] { line = line ", " $$1 " " $$2 " (" pin[$$1] " pinned)" } \
		END { print "newest:" (line ? substr(line, 2) : " as pinned") }' constraints.txt -
	$(NEWEST) -m pytest $(FAST) $(ARGS)

test-all: .venv/judge .venv/playground .venv/browser .venv/deepspeed ## Run the slow tests too
	$(PYTHON) -m pytest $(ARGS)

test-gpu: install ## Run the tests that need a GPU (minutes)
	$(PYTHON) -m pytest -m gpu -rs $(ARGS)

lint: install ## Check format, style and the order of the packages
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	.venv/bin/lint-imports --no-cache
	.venv/bin/shellcheck .ci/run accelerate_configs/slurm.sbatch

clean: ## Delete the virtual environments and caches; runs/ stays
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache
	@echo 'runs/ is kept: delete it by hand.'
