# Everything a fresh machine needs is python3, a C++ compiler and make.
#   make demo    a trained model on pages, the main job on real images: pictures and tables
#   make test    the test suite
#   make help    the rest

PYTHON ?= python3
VENV   ?= .venv
# The torch that is installed where the environment has none; any torch>=2.11 works.
TORCH  ?= torch==2.13.0
OUT    ?= out/demo
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc vico_ext _build_backend -type f \
             -not -name '*.so' -not -path '*/__pycache__/*')

.PHONY: help reproduce reproduce-fast demo test lint format bench bench-report gpu install sanitize package clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)" numpy
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) install --quiet ".[demo]"
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install --quiet ".[test,lint]" build
	@touch $@

## make install   a virtual environment in .venv with torch and vico_ext
install: $(VENV)/.installed

## make demo      a small trained Flash on pages, real images through a small InternVL: tokens, times, pictures in out/demo
demo: $(VENV)/.installed
	cd / && $(abspath $(BIN))/vico demo --out $(abspath $(OUT))

## make test      the test suite against the installed package
test: $(VENV)/.tools
	$(BIN)/pytest

## make lint      ruff, mypy, clang-format and the house rules
lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	sh .ci/house_rules.sh

## make format    rewrite the sources in the house style
format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

## make sanitize  the op tests under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize: $(VENV)/.tools
	sh .ci/sanitize.sh $(abspath $(BIN))

## make package   sdist, wheel, editable and offline installs, each in an environment of its own
package: $(VENV)/.tools
	sh .ci/package.sh $(abspath $(BIN))

## make bench     all benchmarks, recorded in bench/results (about 20 minutes), README tables rewritten
bench: $(VENV)/.tools
	mkdir -p bench/results
	$(BIN)/pytest bench -q --benchmark-json=bench/results/cpu.json
	$(BIN)/python bench/report.py

$(VENV)/.reproduce: $(VENV)/.installed
	$(PIP) install --quiet ".[reproduce]"
	@touch $@

## make reproduce       ViCO from nothing: a reference, then three seeds of both stages, tables and plots in runs/reproduce
reproduce: $(VENV)/.reproduce
	cd examples && $(abspath $(BIN))/python -m reproduce.run --out ../runs/reproduce

## make reproduce-fast  one seed of both stages from the reference that ships, in runs/reproduce-fast
reproduce-fast: $(VENV)/.reproduce
	cd examples && $(abspath $(BIN))/python -m reproduce.run --fast --out ../runs/reproduce-fast

## make gpu       on a machine with a GPU: build, conformance, tests, sanitizers, benchmarks in nine minutes; uses the
##                python3 that has torch, installs nothing, and records in bench/results/gpu.json
gpu:
	PYTHON=$(PYTHON) sh bench/gpu/run.sh

## make bench-report  rewrite the README tables from bench/results
bench-report: $(VENV)/.tools
	$(BIN)/python bench/report.py

## make clean     remove what was built (the virtual environment stays)
clean:
	rm -rf build dist out vico_ext/*.so
