# make quickstart   trains a small model on this Python's own source, and lets it write (4 minutes on 2 cores)
# make posttrain    pretraining, fine-tuning, GRPO and DPO of a tiny model that learns to think (15 minutes on 2 cores);
#                   SEEDS=3 repeats all but the pretraining with three seeds
# make test         the tests, one worker to a core; the ten slowest and the time it took stand at the end
# make test-all     those marked slow as well: the same properties at a larger size, or on more cases
# make lint         ruff
# Each makes .venv first where it is missing. PYTHON=python3.12 make ... takes another interpreter (3.11 or newer).

PYTHON ?= python3
SEEDS ?= 1
RUN := .venv/bin/python
TEST := $(RUN) -m pytest --numprocesses=auto --dist=loadgroup --durations=10

.PHONY: quickstart posttrain test test-all lint

quickstart: .venv/installed
	$(RUN) data/prepare.py stdlib --tokenizer bpe:4096
	$(RUN) train.py config/quickstart.py --resume=auto
	$(RUN) sample.py out/quickstart --prompt "class Reader:" --num_samples 3 --temperature 0.6 --top_p 0.95 --repetition_penalty 1.1
	@echo "the loss is drawn in out/quickstart/loss.png"

posttrain: .venv/installed
	$(RUN) bench.py posttrain --seeds $$(seq $(SEEDS))

test: .venv/installed-dev
	$(TEST) -m "not slow"

test-all: .venv/installed-dev
	$(TEST)

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/installed
