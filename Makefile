# The two commands: `make demo` and `make test`. All make their own virtual
# environment on first use; only python3 (>= 3.11, with venv) is needed.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed
INSTALLED_SLOW = $(VENV)/.installed_slow
INSTALLED_DOCS = $(VENV)/.installed_docs

# Python keeps what it compiles, wherever the environment says not to: the tests
# start many processes.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo clip-demo study-small test test-slow test-browser docs lint format \
  clean

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[test]"
	@# As pip does with packages that are not editable.
	$(RUN) -m compileall -q gradmimic_jax experiments configs
	@touch $@

$(INSTALLED_SLOW): $(INSTALLED)
	$(RUN) -m pip install --quiet --editable ".[peers]"
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(RUN) -m pip install --quiet --editable ".[docs]"
	@touch $@

# The label-noise study on scikit-learn's handwritten digits.
demo: $(INSTALLED)
	$(RUN) -m experiments.study --config=configs/digits.py --workdir=runs/digits

# CLIP on rendered shapes with wrong captions: the steps that Grad-Mimic saves,
# the pairs that it finds, and a page with the worst of them.
clip-demo: $(INSTALLED)
	$(RUN) -m experiments.study --config=configs/shapes.py \
	  --workdir=runs/clip_shapes

# The whole label-noise study of the paper on those digits: every method, heads
# and all weights, with settings tuned alike.
study-small: $(INSTALLED)
	$(RUN) -m experiments.sweep --config=configs/sweep.py:study=digits \
	  --workdir=runs/study_small
	@cat runs/study_small/results/tables.md

# One process a core; a file's tests share what they have compiled.
test: $(INSTALLED)
	$(RUN) -m pytest -n auto --dist loadfile

test-slow: $(INSTALLED_SLOW)
	$(RUN) -m pytest -n auto --dist loadfile -m slow

# The report in a real browser; needs Debian's package chromium.
test-browser: $(INSTALLED)
	$(RUN) -m pytest -m slow tests/test_report_browser.py \
	  tests/test_report_work_browser.py

# The documentation, with its notebooks run; a warning is an error. Fetches
# nothing but the packages.
docs: $(INSTALLED_DOCS)
	JAX_PLATFORMS=cpu $(RUN) -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "open build/docs/index.html"

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
