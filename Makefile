# SPDX-License-Identifier: Apache-2.0
#
# One word per action; each first sets up .venv, once. Needs python3 (with venv), g++ and make.
# PYTHON=python3.12 picks another interpreter for .venv, TORCH=... another torch; DILSEG_BUILD,
# DILSEG_CUDA_ARCH_LIST, DILSEG_DEBUG and MAX_JOBS are handed to the build (see README.md).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
DEMO := runs/demo
BENCH := runs/bench
# The cases that `make bench` measures (benchmarks/README.md).
BENCH_SET ?= quick
BENCH_FILE := import torch; from datetime import date; from pathlib import Path; \
  from benchmarks import gpu_job, machine; \
  device = 'cuda' if torch.cuda.is_available() else 'cpu'; \
  name = machine.describe(device, package=False)['name']; \
  print(gpu_job.results_path(Path('$(BENCH)'), name, date.today()))
DEMO_IMAGES := from pathlib import Path; from dilseg.data import Shapes, save_image; \
  to = Path('$(DEMO)/images'); to.mkdir(exist_ok=True); shapes = Shapes('test'); \
  [save_image(to / f'{shapes.name(i)}.png', shapes.load(i)[0]) for i in range(8)]
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help build demo test check kernels sanitize bench report gpu format clean
help:  ## list the actions
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

# A torch that somebody put into .venv before (say, one with CUDA) is kept.
$(VENV)/stamp: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q "$(TORCH)"
	$(PY) -m pip install -q --editable '.[dev]'
	@$(PY) -m pip install -q --retries 0 --timeout 15 --editable '.[kernels]' || echo "went on without nvdisasm"
	touch $@

build: $(VENV)/stamp  ## compile what changed, in place
	$(PY) -m build_tools

# Threads that wait by spinning slow a busy small machine down tenfold; these sleep.
demo test bench: export OMP_WAIT_POLICY = passive
demo: build  ## train, evaluate and predict on generated shapes, in minutes on a CPU
	$(PY) -m dilseg train --data shapes --out $(DEMO) --overwrite
	$(PY) -m dilseg eval --checkpoint $(DEMO)/best.pt --split test
	@$(PY) -c "$(DEMO_IMAGES)"
	$(PY) -m dilseg predict --checkpoint $(DEMO)/best.pt --input $(DEMO)/images --out $(DEMO)/predictions
	@echo "curve: $(DEMO)/curve.png   scores: $(DEMO)/eval-test.json   overlays: $(DEMO)/predictions/*_overlay.png"

test: build  ## run every test that this machine can
	OMP_NUM_THREADS=1 EMULATOR_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8

# One schedule of each kernel under AddressSanitizer and UndefinedBehaviorSanitizer, on the CPU.
sanitize: build  ## run the emulated kernels under the compiler's sanitizers
	OMP_NUM_THREADS=1 EMULATOR_VARIANT=sanitized EMULATOR_SCHEDULES=1 \
	  ASAN_OPTIONS=detect_leaks=0:use_sigaltstack=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(PY) -m pytest -q -p no:xdist tests -k "emulated and agrees and contiguous and float32"

check: $(VENV)/stamp  ## lint, types and formatting
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

kernels: build  ## compile every kernel and compare its resources with docs/kernels/resources.md
	$(PY) -m build_tools.kernels

# What was measured before a failure is reported too.
bench: build  ## measure each op against torch on this machine, in minutes on a CPU
	@file=$$($(PY) -c "$(BENCH_FILE)") || exit; page=$${file%.json}; status=0; \
	$(PY) -m pytest benchmarks --benchmark-only -q -p no:xdist --set $(BENCH_SET) \
	  --results "$$file" || status=$$?; \
	if [ -f "$$file" ]; then \
	  $(PY) -m benchmarks.report "$$file" --plots $(BENCH) --html "$$page.html" > "$$page.md" || exit; \
	  echo "results: $$file   tables: $$page.md   with plots: $$page.html"; fi; exit $$status

report: $(VENV)/stamp  ## write the figures of README.md and docs from benchmarks/results/
	$(PY) -m benchmarks.report --update

# Runs in an environment that already holds a CUDA torch, and needs no network.
gpu:  ## on a GPU machine: build for its GPU, test, sanitize and measure
	@for p in $(PYTHON) $(PY); do \
	  if "$$p" -c "import sys, torch; sys.exit(torch.version.cuda is None)" 2>/dev/null; then \
	    exec "$$p" -m benchmarks.gpu_job; fi; done; \
	echo "make gpu: neither $(PYTHON) nor $(PY) has a torch with CUDA; nothing was run"

format: $(VENV)/stamp  ## rewrite the sources in the house format
	$(PY) -m ruff check --fix -q . ; $(PY) -m ruff format . && $(VENV)/bin/clang-format -i $(CXX_FILES)

clean:  ## remove what was built (not .venv, not runs/)
	rm -rf build dist *.egg-info dilseg/_C.*.so dilseg/_build_info.py
