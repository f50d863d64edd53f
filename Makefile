# Each target sets up what it needs, from nothing but git, make and a Python >= 3.11. ARGS goes to the tool that runs.

PYTHON ?=
ARGS ?=
BIN := .venv/bin
COMPILE := uv pip compile pyproject.toml --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-header --quiet
export PYTHON
# How long an idle OpenMP thread spins before it sleeps. By default long enough to take the cores from those that work
# beside it; shorter than this, and the many small products of sampling wait for threads to wake up (16.8 ms a step of a
# 12-layer GPT with 2000, 12.8 with this and with the default).
export GOMP_SPINCOUNT ?= 10000

.PHONY: help install install-bench quickstart bench test test-fast test-lowest test-torch-2.11 test-paths soak lint format lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed ## make .venv and install requirements.lock and this project into it

# Again only when one of these changed, so that a second `make test` starts at once.
.venv/.installed: requirements.lock pyproject.toml
	.ci/install
	@touch $@

install-bench: .venv/.installed-bench ## the same, and the peers that benchmarks/ compares with

.venv/.installed-bench: benchmarks/requirements.lock pyproject.toml
	.ci/install benchmarks/requirements.lock
	@touch .venv/.installed $@

# Environments of their own for other versions; each has its lock in .ci/.
.venv-%/.installed: .ci/%.lock pyproject.toml
	.ci/install $< .venv-$*
	@touch $@

quickstart: install ## train a tokenizer and a prior on drawn shapes, make 64 images and a page about all of it
	$(BIN)/python stage1_tokenizer/train.py
	$(BIN)/python stage2_prior/train.py --tokenizer runs/stage1/shapes_vq
	$(BIN)/python sampling/generate.py -n 64
	$(BIN)/python sampling/summary.py
	$(BIN)/python sampling/report.py

test: install ## run all tests, on all cores (ARGS="-k codebook" chooses)
	$(BIN)/pytest -n logical --dist loadfile $(ARGS)

test-lowest: .venv-lowest/.installed ## run all tests with the lowest versions that pyproject.toml admits
test-torch-2.11: .venv-torch-2.11/.installed ## run all tests with torch 2.11
test-lowest test-torch-2.11: test-%:
	.venv-$*/bin/pytest -n logical --dist loadfile $(ARGS)

bench: install-bench ## compare with the peers, an hour for all (ARGS="gpt_decoding" chooses); see docs/performance.md
	$(BIN)/python -m benchmarks.run $(ARGS)

soak: install ## end all three commands at random for ten minutes, and fuzz every format (ARGS="--minutes 60")
	OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore $(BIN)/python -m tests.helpers.soak $(ARGS)

test-fast: install ## run the tests that take seconds
	$(BIN)/pytest -n logical --dist loadfile -m "not slow" $(ARGS)

PATHS_TESTS := tests/machines/test_fast_paths.py tests/stage1_tokenizer/bottlenecks tests/stage2_prior/planning tests/stage2_prior/gpt \
	tests/stage2_prior/test_fast_linear.py tests/stage2_prior/test_prior.py \
	tests/stage2_prior/test_generation.py tests/stage2_prior/test_likelihood.py tests/stage2_prior/test_train.py

test-paths: install ## run the tests that meet the processor's fast paths with all of them forced on, and off
	TESSERA_FAST_PATHS=onednn,packed,bfloat16 $(BIN)/pytest -n logical --dist loadfile $(PATHS_TESTS) $(ARGS)
	TESSERA_FAST_PATHS=-onednn,-packed,-bfloat16 $(BIN)/pytest -n logical --dist loadfile $(PATHS_TESTS) $(ARGS)

lint: install ## check rules, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## bring all locks up to pyproject.toml (needs uv; ARGS=--upgrade takes the newest versions)
	$(COMPILE) --extra dev --extra app --output-file requirements.lock $(ARGS)
	$(COMPILE) --extra dev --extra app --extra bench --constraint requirements.lock --output-file benchmarks/requirements.lock
	$(COMPILE) --extra dev --extra app --extra bench --resolution lowest-direct --output-file .ci/lowest.lock
	$(COMPILE) --extra dev --extra app --extra bench --constraint .ci/torch-2.11.in --output-file .ci/torch-2.11.lock $(ARGS)

clean: ## remove caches and build artefacts; .venv and runs/ stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find . -path "./.venv*" -prune -o -path ./runs -prune -o -name __pycache__ -type d -exec rm -rf {} +
