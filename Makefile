# Each target sets up what it needs in .venv; nothing but Python 3.11 or newer has to be there.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
READY_DEV := .venv/ready-dev

.PHONY: demo circle test test-all lint leaderboard tune ablation bench full-size scale real chaos fuzz
.PHONY: book clean

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"This needs Python 3.11 or newer, and $(PYTHON) is not: make $(MAKECMDGOALS) PYTHON=python3.11"; \
		exit 1; }
	@echo "Installing into .venv, once: 0.4 GB to download, several with a torch for CUDA."
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

$(READY_DEV): $(READY) requirements-dev.txt
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	touch $@

# Align the embedded model, judge it against its start on prompts that alignment never saw.
demo: $(READY)
	$(BIN)/python train_inpo.py --model tiny --out out/demo/aligned
	$(BIN)/python evaluate.py --models base=tiny aligned=out/demo/aligned --prompts toy --seeds 16 --out out/demo
	cp out/demo/aligned/curves.png out/demo/curves.png
	@echo "Look at out/demo/toy.png and out/demo/curves.png."

# Align the embedded model with pairs of its own pictures, see docs/made_pairs.md.
circle: $(READY)
	$(BIN)/python pairs.py make --model tiny --prompts toy-train --rounds 8 --judge preference --out out/circle/pairs.parquet
	$(BIN)/python train_inpo.py --model tiny --data out/circle/pairs.parquet --out out/circle/aligned
	$(BIN)/python evaluate.py --models base=tiny aligned=out/circle/aligned --prompts toy --seeds 16 --out out/circle

# Every method and cross, on three tasks and in half precision; continues where it was stopped.
leaderboard: $(READY)
	$(BIN)/python -m lab.study leaderboard --out out/leaderboard --report docs/leaderboard.md
	$(BIN)/python -m lab.study noisy --out out/leaderboard --report docs/leaderboard.md
	$(BIN)/python -m lab.study red --out out/leaderboard --report docs/leaderboard.md
	$(BIN)/python -m lab.study precision --out out/leaderboard --report docs/leaderboard.md

# The settings that the leaderboard chooses from; likewise.
tune: $(READY)
	$(BIN)/python -m lab.study tune --out out/tune --report docs/tune.md

# What the parts of InPO do; likewise.
ablation: $(READY)
	$(BIN)/python -m lab.study ablation --out out/ablation

test: $(READY_DEV) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# With the slow tests, and in random order; --randomly-seed=N repeats an order.
test-all: $(READY_DEV) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -p randomly

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Kill every program again and again, and compare it with an undisturbed one.
chaos: $(READY)
	$(BIN)/python -m lab.chaos --report docs/reliability.md

# Feed the programs thousands of damaged and odd inputs, and count what they do.
fuzz: $(READY_DEV)
	$(BIN)/python -m lab.fuzz --report docs/reliability.md

# Speed of a training step, by part, into docs/speed.md; on a GPU: make bench BENCH="--model sdxl"
BENCH ?= --model tiny mid
bench: $(READY)
	$(BIN)/python -m lab.bench $(BENCH) --report docs/speed.md

# SDXL and SD1.5 at full size and random weights, without a GPU: 18 GB of memory, 15 GB in /tmp, or
# make full-size FULL_SIZE="--model sd15 --scratch FOLDER"
FULL_SIZE ?= --model both
full-size: $(READY)
	$(BIN)/python -m lab.full_size $(FULL_SIZE) --report docs/speed.md

# Step time on 8 to 512 GPUs, computed.
scale: $(READY)
	$(BIN)/python -m lab.scale --report docs/speed.md

# SDXL on a GPU: a short LoRA run and its judgement, in one file to send back, see docs/real.md;
# make real REAL="--data mine.parquet"
REAL ?=
real: $(READY)
	$(BIN)/python -m lab.real $(REAL)

# The book, docs/book/, as notebooks and pages in out/book: all cells are run, a few minutes.
book: $(READY_DEV)
	$(BIN)/python -m lab.book

clean:
	rm -rf .venv out/demo
