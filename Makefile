# make demo     three synthetic hospitals pretrain one encoder; the report is runs/demo/report.html
# make test     formatting, lint, types and the test suite: all that CI runs
# make install  this program into .venv, with all that the two above need; they do it by themselves
# make help     this list
# Any of them with SYSTEM_TORCH=1 uses the torch that PYTHON brings, such as a GPU machine's own build.
PYTHON ?= python3
SYSTEM_TORCH ?=
BIN := .venv/bin
INSTALLED := .venv/installed
OUT ?= runs/demo

export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1

.PHONY: demo test check install clean-demo help

demo: $(INSTALLED)
	$(BIN)/unimiss-simulate configs/simulation/demo.yaml --out $(OUT) --resume \
		|| { code=$$?; echo "To start the demo over: make clean-demo"; exit $$code; }

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean-demo:
	rm -rf $(OUT)

install: $(INSTALLED)

help:
	@sed -n 's/^# //p' Makefile | head -5

# Through the environment, so that it also holds where pip builds the package: older pips read the first, newer the second.
$(INSTALLED): export PIP_CONSTRAINT = .venv/constraints.txt
$(INSTALLED): export PIP_BUILD_CONSTRAINT = .venv/constraints.txt
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(if $(SYSTEM_TORCH),--system-site-packages) .venv \
		|| { echo "Python's venv module is missing; on Debian: apt install python3-venv"; rm -rf .venv; exit 1; }
	@grep -v $(if $(SYSTEM_TORCH),'^torch==','^#') constraints.txt > .venv/constraints.txt
	@echo "Installing into .venv: some minutes the first time"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
