# make demo · make test · make bench: each sets up what it needs in .venv and runs.
#
# A torch that $(PYTHON) already has is used as it is; otherwise torch is installed: the CPU release below where
# there is no NVIDIA GPU, the newest release that pyproject.toml allows where there is.
PYTHON ?= python3
CPU_TORCH ?= torch==2.13.0
GPU_TORCH ?= torch>=2.11,<2.14
# What torch brings only where there is a GPU: as large as torch, and they need nothing of each other.
TRITON := triton>=3.6
RUN := .venv/bin/python
# Python compiles modules when they are imported: few of those that pip would compile first, for a minute.
INSTALL := PYTHONWARNINGS=ignore $(RUN) -m pip install -q --no-compile
ready := .venv/ready

.PHONY: demo test lint unit bench docs clean
.DEFAULT_GOAL := test

demo: $(ready)
	$(RUN) examples/train_clip.py

# Both at once: mypy keeps one core busy for half a minute, as pytest does while it starts.
test: $(ready)
	@$(MAKE) --no-print-directory -j 2 lint unit

unit: $(ready)
	$(RUN) -m pytest -q -n 2 --dist worksteal

lint: $(ready)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(ready)
	$(INSTALL) -e '.[benchmarks]'
	$(RUN) benchmarks/kernel_speed.py
	$(RUN) benchmarks/train_step.py --peers
	$(RUN) benchmarks/compile_time.py
	$(RUN) benchmarks/layer_speed.py --sweep --plot runs/layer_speed.png
	$(RUN) benchmarks/optimizer_step.py

docs: $(ready)
	$(RUN) docs/make_docs.py

# The pip of Python 3.11 takes twice as long as today's.
$(ready): pyproject.toml
	$(PYTHON) -m venv --clear --upgrade-deps .venv >/dev/null
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
	  echo "using the torch of $(PYTHON)"; \
	  $(PYTHON) -c "import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))" \
	    > "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"; \
	elif command -v nvidia-smi >/dev/null; then \
	  $(INSTALL) "$(GPU_TORCH)"; \
	else \
	  $(INSTALL) "$(TRITON)" & $(INSTALL) "$(CPU_TORCH)" && wait $$!; \
	fi
	$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
