# Everything lives in .venv; a stamp there says what is installed, so a second call installs nothing.
# make demo | test | check | format | fuzz | chaos | clean

.POSIX:
.PHONY: demo test check format fuzz chaos clean

PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin
STAMPS = $(VENV)/stamps
TORCH = torch==2.13.0
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

MODEL = .cache/SmolLM2-135M-Instruct
BUDGET = 3.25
CODES = uniform
N = 16

demo: $(STAMPS)/demo
	test -f $(MODEL)/config.json || $(BIN)/python -m flows.demo_model --output $(MODEL)
	$(BIN)/lrpq compress $(MODEL) --budget $(BUDGET) --codes $(CODES) \
		--calibration pydoc:calibrate --calibration-windows $(N) --length 512 \
		--evaluation pydoc:evaluate --evaluation-windows 16 --evaluation-length 512 \
		--output .cache/demo --store .cache/store --overwrite

# WORKERS processes of one thread, a file at a time for each, in order: those with servers and clusters come first, the
# short ones fill up the end; WORKERS=0 for pytest alone
WORKERS ?= 2
test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(STAMPS)/check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMPS)/check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# every night: 20,000 mutations for each reader, about an hour and a half on one core; CASES=200 for a taste
CASES = 20000
fuzz: $(STAMPS)/test
	$(BIN)/python -m tests.fuzz.run --cases $(CASES)

# kills of workers, nodes, the driver and both servers in every stage, about half an hour on two quiet cores
chaos: $(STAMPS)/test
	$(BIN)/python -m tests.chaos.run --output .cache/chaos.json
	$(BIN)/python -m tests.chaos.shapes

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find lrpq tasks flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: pip then takes the build that its configuration offers, and nothing later replaces it
$(STAMPS)/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml
	$(INSTALL) --editable '.[gguf]'
	touch $@

$(STAMPS)/test: $(STAMPS)/torch pyproject.toml
	$(INSTALL) --editable '.[gguf,images,s3,test]'
	touch $@

$(STAMPS)/check: $(STAMPS)/torch pyproject.toml
	$(INSTALL) --editable '.[gguf,images,s3,check]'
	touch $@
