# Each target sets up what it needs: a virtual environment, the package, the demo's model and data.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-lowest test-lowest-quick test-slow test-pages test-distributed test-eval test-gpu test-gallery test-field docs lint clean

# torch first and alone: a pinned CPU build where one is at hand, before anything else asks for a looser version.
$(VENV)/installed: setup.cfg $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[compare,demo,dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow and not distributed and not gallery" $(TESTS)

# The lowest versions that setup.cfg allows: all tests, by hand, and those of what touches other libraries most.
LOWEST := VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt
test-lowest:
	$(MAKE) test $(LOWEST)

test-lowest-quick:
	$(MAKE) test $(LOWEST) TESTS="$(addprefix tests/test_,registry.py trainer.py recipes.py cli.py)"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q -m slow

# Commands and snippets of README.md and docs/, as a new user has them: the package installed as they say, in an environment
# of its own, and nothing of its source beside them.
CLEAN := .clean
test-pages:
	rm -rf $(CLEAN) && git checkout-index --all --prefix=$(CLEAN)/
	$(PYTHON) -m venv $(CLEAN)/.venv
	cd $(CLEAN) && .venv/bin/pip install --quiet -c constraints.txt . && .venv/bin/pip install --quiet -c constraints.txt '.[compare,dev]'
	cd $(CLEAN) && rm -r pion_hf && .venv/bin/python -m pytest -q -k run tests/test_pages.py

# Several processes, and what a run must survive; ends with a table of what was tried, how often, what was lost.
test-distributed: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/test_sharding.py tests/test_distributed.py \
		tests/test_faults.py tests/test_fuzz.py tests/test_resume.py tests/test_masters.py

# Benchmarks of lm-evaluation-harness (the extra eval, a third of a gigabyte); without it these tests are skipped.
test-eval: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[eval]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_lm_eval.py

# Every rule on a GPU, with a table of times, kernels and memory; skipped without one.
test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -q -s tests/gpu

# Other people's training scripts, unmodified: TRL's, and those of a folder of transformers' examples/pytorch (SCRIPTS).
# PAGE=tests/field/README.md puts the table there, of this target and of the next.
test-gallery: $(VENV)/installed
	@test -n "$(SCRIPTS)" || { echo "make test-gallery SCRIPTS=transformers/examples/pytorch"; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --requirement tests/gallery/requirements.txt
	OMP_NUM_THREADS=1 PION_HF_SCRIPTS="$(SCRIPTS)" PION_HF_PAGE="$(PAGE)" $(BIN)/python -m pytest -q -s \
		-p tests.gallery.operators tests/test_gallery.py

# Damaged and hostile inputs of every kind, and a table of what became of them.
test-field: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.field $(if $(PAGE),--page $(PAGE))

# The pages of docs/, as a site; whatever is wrong with them is an error (not with --quiet, which counts no warnings).
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .venv-lowest $(CLEAN) models data runs site
