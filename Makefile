# make demo, make test: the two commands of the README. make help lists the others.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
RUN := PATH="$(BIN):$$PATH" PYTHON="$(BIN)/python" TF_CPP_MIN_LOG_LEVEL=3
INSTALL := "$(BIN)/python" -m pip install --quiet --disable-pip-version-check
TEST := TF_NUM_INTRAOP_THREADS=1 "$(BIN)/python" -m pytest -n 2 --dist worksteal

.PHONY: help install demo test test-jax test-torch bench scaling soak lint table1 clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/installed ## make .venv with everything that running needs

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Python 3.11 to 3.13 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed ## two depths on embedded digits, through notebooks: table and pictures
	$(RUN) DATASET=digits WIDTH=0.125 LATENT_DIM=16 INTERMEDIATE_DIM=256 EPOCHS=30 BATCH_SIZE=32 LEARNING_RATE=0.002 \
		DEPTHS="28 40" scripts/run_all.sh runs/demo
	@echo "Pictures:"; ls runs/demo/*.png runs/demo/*/*.png

table1: $(VENV)/installed ## the post's Table 1: CIFAR-10, four depths; on a GPU at full width, else at a quarter of it
	$(RUN) scripts/table1.sh runs/table1

test: $(VENV)/installed-dev ## the test suite on TensorFlow
	$(RUN) $(TEST)

test-jax: $(VENV)/installed-dev ## the same tests on JAX
	$(RUN) KERAS_BACKEND=jax $(TEST)

test-torch: $(VENV)/installed-dev ## the same tests on PyTorch, where it is installed into .venv
	$(RUN) KERAS_BACKEND=torch $(TEST)

bench: $(VENV)/installed ## training speed against PyTorch, into results/bench; BENCH="--cases …" for a part
	$(INSTALL) -r benchmarks/requirements.txt
	$(RUN) "$(BIN)/python" benchmarks/speed.py $(BENCH)

scaling: $(VENV)/installed ## time and memory against depth, width, image size and batch, into results/scaling
	$(RUN) "$(BIN)/python" benchmarks/scaling.py $(SCALING)

soak: $(VENV)/installed ## a quarter of an hour of killing small runs and continuing them, into results/soak
	$(RUN) scripts/soak.sh

lint: $(VENV)/installed-dev ## ruff on the package, the tests, the scripts and the notebooks
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
