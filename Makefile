# Two commands need nothing else set up:  make demo   and   make test
PYTHON ?= python3
VENV   ?= .venv
NEWEST ?= .venv-newest
OLDEST ?= .venv-oldest
UVENV  ?= .venv-uv
JOBS   ?= 2
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
UV     := UV_CUSTOM_COMPILE_COMMAND='make lock' UV_PYTHON_DOWNLOADS=never $(UVENV)/bin/uv --system-certs -q
MOVED  := $(UVENV)/bin/python requirements/moved.py

# The libraries whose models are hosts, and what they take with them; the tests that run those models.
HOSTS := transformers diffusers open-clip-torch timm huggingface-hub tokenizers safetensors
HOST_TESTS := tests/hosts tests/activations/test_extract.py tests/datamodules/test_generation.py \
    tests/datamodules/test_image_text.py tests/datamodules/test_streaming.py tests/steering/edits/test_attach.py \
    tests/steering/edits/test_intervention_diffusion.py tests/steering/edits/test_intervention_lvlm.py tests/steering/test_recipe.py \
    tests/steering/methods/test_text.py tests/steering/methods/test_denoiser_block.py tests/lvlm/decoding/test_concept.py \
    tests/filtering/scorers/test_lvlm.py tests/lvlm/hallucination/test_pope.py tests/world/models/llava/test_train.py \
    tests/world/models/test_clip.py tests/world/models/diffusion/test_model.py

.PHONY: demo test test-long test-newest test-oldest wheels lock lint docs notebooks clean

demo: $(READY)  ## train and compare multimodal SAEs on a generated world; report in runs/demo/report.html
	$(BIN)/mmsae demo --out runs/demo

test: $(READY)  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-long: $(READY)  ## what the suite leaves out, since it takes minutes: more ranks, processes, a Ray cluster
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m long

test-newest: $(READY) $(UVENV)/.ready  ## the tests of hosts, with the newest host libraries that pyproject.toml allows
	@cp requirements/lock.txt $(NEWEST).all.txt
	@$(UV) pip compile pyproject.toml $(COMPILE) $(addprefix -P ,$(HOSTS)) -o $(NEWEST).all.txt
	@$(MOVED) requirements/lock.txt $(NEWEST).all.txt > $(NEWEST).txt
	@if ! grep -q == $(NEWEST).txt; then echo "Nothing newer than the lock is allowed: nothing to test."; \
	else $(call test_hosts,$(NEWEST),$(NEWEST).txt); fi

test-oldest: $(READY) $(UVENV)/.ready  ## the tests of hosts, with the oldest host libraries that pyproject.toml allows
	@$(call test_hosts,$(OLDEST),requirements/oldest.txt)

wheels: $(UVENV)/.ready  ## the wheel, tried in a fresh environment of every Python that it is for
	UVENV=$(UVENV) bash requirements/wheels.sh $(PYTHONS)

# $(call test_hosts,ENVIRONMENT,FILE): a small environment with the packages of FILE, before those of the locked one
define test_hosts
$(BIN)/python -m venv --clear --without-pip $(1) && \
$(BIN)/python -c 'import site, sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
    > $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/locked.pth && \
$(UV) pip install --compile-bytecode --python $(1)/bin/python --require-hashes --no-deps -r $(2) && \
{ OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(HOST_TESTS) || \
  { echo "The tests of hosts fail with other versions than the lock's (lock -> here):"; \
    $(MOVED) requirements/lock.txt $(2) > /dev/null; exit 1; }; }
endef

# Exact versions of everything with hashes, from PyPI alone: see docs/development.md.
COMPILE := --extra test --universal --python-version 3.10 --generate-hashes --no-annotate
lock: $(UVENV)/.ready  ## the newest versions of everything into requirements/
	printf 'uv\npackaging\n' | $(UV) pip compile - --universal --python-version 3.10 --generate-hashes -U \
	    -o requirements/uv.txt
	rm -f uv.lock
	$(UV) export --extra test --no-emit-project --no-annotate -o requirements/lock.txt
	rm -f uv.lock
	cp requirements/lock.txt oldest.tmp
	$(UV) pip compile pyproject.toml requirements/oldest.in $(COMPILE) -o oldest.tmp
	$(MOVED) requirements/lock.txt oldest.tmp > requirements/oldest.txt
	rm -f oldest.tmp

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

notebooks: $(READY)  ## execute notebooks/*.ipynb and write their outputs back
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/run.py

docs: $(READY)  ## the documentation site into build/docs, with pages that come from the code
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_recipes.py
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

NEW_ENOUGH := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mmsae needs Python 3.10 or newer, this is " + sys.version.split()[0])'

# uv installs the lock in a third of the time that pip takes; compiled, since each command would compile it all anew where
# PYTHONDONTWRITEBYTECODE is set
$(READY): pyproject.toml requirements/lock.txt $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(UVENV)/.ready)
	@$(NEW_ENOUGH)
	$(PYTHON) -m venv $(VENV)
	@echo "Installing mmsae and what it needs into $(VENV) (about 6 GB, some minutes) ..."
ifeq ($(shell uname -sm),Linux x86_64)
	$(UV) pip install --compile-bytecode --python $(BIN)/python --require-hashes --no-deps --only-binary :all: \
	    -r requirements/lock.txt
	$(BIN)/python -W ignore -m pip install -q --no-build-isolation --no-deps -e .
else
	@echo "The lock is for Linux on x86-64; here come the newest versions that pyproject.toml allows."
	$(BIN)/python -m pip install -q -e ".[test]"
endif
	@touch $@

$(UVENV)/.ready: requirements/uv.txt
	@$(NEW_ENOUGH)
	@$(PYTHON) -m venv $(UVENV)
	@$(UVENV)/bin/python -m pip install -q --require-hashes -r requirements/uv.txt
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(NEWEST).txt $(NEWEST).all.txt $(OLDEST) $(UVENV) build dist *.egg-info
