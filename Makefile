# Two commands need nothing else set up:  make demo   and   make test
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint docs notebooks clean

demo: $(READY)  ## train and compare multimodal SAEs on a generated world; report in runs/demo/report.html
	$(BIN)/mmsae demo --out runs/demo

test: $(READY)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

notebooks: $(READY)  ## execute notebooks/*.ipynb and write their outputs back
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/run.py

docs: $(READY)  ## docs/cli.md from the code
	$(BIN)/python docs/make_cli.py

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mmsae needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing mmsae and what it needs into $(VENV) (about 6 GB, some minutes) ..."
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
