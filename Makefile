# make demo    two models rewritten, verified and timed     make test    the whole suite
# PIP_ARGS goes to every pip install: on a machine whose index has only CUDA builds of torch, name the CPU index there.

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
STAMP := .venv/.installed

# Torch first and pinned, and what depends on it without its dependencies: no plain torch (CUDA) may be resolved.
TORCH := torch==2.13.0
FBGEMM := fbgemm-gpu-cpu==1.8.0
NO_DEPS := deepctr-torch==0.3.0 torchrec==1.8.0
OF_NO_DEPS := torchmetrics==1.0.3 tensordict pyre-extensions typing-inspect mypy-extensions lightning-utilities tqdm \
	orjson pyvers cloudpickle requests scikit-learn

.PHONY: demo test lint install clean

demo: $(STAMP)
	$(BIN)/python -m tools.demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)" numpy
	$(PIP) "$(TORCH)" "$(FBGEMM)" -e ".[cpu,dev]"
	$(PIP) --no-deps $(NO_DEPS)
	$(PIP) "$(TORCH)" $(OF_NO_DEPS)
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
