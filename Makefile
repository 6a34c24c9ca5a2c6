# `make demo` and `make test` each do everything from a bare python3 (3.10 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build
PICTURE := examples/nano/images/shapes.png
QUESTION := describe the picture.

# Installed packages import as mvlm_export.*; mypy sees the same tree through these links.
TYPING := $(BUILD)/typing
FOLDERS := engines passes calibration exporter

.PHONY: demo test setup lint types unit clean

demo: setup
	$(BIN)/mvlm-export --target cpu --output $(BUILD)/nano-cpu --overwrite
	$(BIN)/mvlm-export --target rtx --output $(BUILD)/nano-rtx --overwrite
	$(BIN)/mvlm run $(BUILD)/nano-cpu --image $(PICTURE) --prompt "$(QUESTION)"

test: setup lint types unit

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	mkdir -p $(TYPING)/mvlm_export
	for folder in $(FOLDERS); do ln -sfn $(CURDIR)/$$folder $(TYPING)/mvlm_export/$$folder; done
	MYPYPATH=$(TYPING) $(BIN)/mypy $(FOLDERS:%=-p mvlm_export.%)

unit: setup
	$(BIN)/pytest -n 2 --dist loadfile

clean:
	rm -rf $(BUILD) $(VENV)
