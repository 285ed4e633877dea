# Everything runs in .venv, made on first use. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin

TRITONS := 3.6.0 3.9.0

# torch - the command of a Python.
VERSIONS ?= 2.11.0-python3.12 2.14.1-python3.11

# The Python of the machine with the GPU: Triton's cache serves one build of Triton alone.
GPU_PYTHON ?= 3.12

# What `make test-machine` compiles the kernels for.
GPUS ?= sm_90

.PHONY: demo bench test test-machine test-long mutants test-triton test-versions test-integrations gpu-run lint types wheel clean

demo: .venv/installed
	$(BIN)/python -m bench demo

bench: .venv/installed
	$(BIN)/python -m bench step --quick --plot bench.png

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/python -m pytest -m gpu; else echo "No GPU here: tests marked gpu were skipped."; fi

# Kernels as they are compiled for a GPU, executed on the CPU (tests/machine): needs gcc 12 or newer.
test-machine: .venv/installed
	@for gpu in $(GPUS); do $(BIN)/python -m pytest -n 2 --ptx $$gpu tests/machine tests/numerics || exit 1; done

# What takes minutes: long trainings and exhaustive sweeps, which `make test` leaves out, and other GPUs.
test-long: .venv/installed
	$(BIN)/python -m pytest -m long
	$(MAKE) test-machine GPUS="sm_80 sm_100 sm_120"

# Small faults, one at a time, in a copy: do the tests notice each? (About 15 minutes on 2 cores.)
mutants: .venv/installed
	$(BIN)/python tests/fuzz/mutants.py

# Code generation, kernels (interpreted and compiled) and their hash under other Tritons: GPU machines carry other versions than CI.
test-triton: $(TRITONS:%=.venv-triton-%/installed)
	@for version in $(TRITONS); do echo "triton $$version"; .venv-triton-$$version/bin/python -m pytest -q -n 2 --dist loadfile \
	tests/numerics/test_codegen.py tests/numerics/test_inspect.py tests/numerics/test_launch.py tests/numerics/test_kernel.py tests/numerics/test_hash.py::test_short_hash_on_the_kernel \
	&& .venv-triton-$$version/bin/python -m pytest -q -n 2 --ptx sm_90 tests/machine tests/numerics \
	|| exit 1; done

# The oldest and the newest torch, each with its Triton, on two Pythons: torch's CUDA builds, some GB each, need no GPU here.
test-versions: $(VERSIONS:%=.venv-torch-%/installed)
	@for version in $(VERSIONS); do echo "torch $$version"; .venv-torch-$$version/bin/python -m pytest -n 2 || exit 1; done

# DDP, FSDP1 and 2, DTensors and ZeRO in several processes, and training frameworks: those of the extra, and torchtitan.
test-integrations: .venv-integrations/installed
	.venv-integrations/bin/python -m pytest -n 2 --dist loadfile tests/integrations

# What a run on another machine's GPU needs, in .gpu: scripts, and kernels compiled here (3 to 5 minutes on 2 cores).
gpu-run: .venv-triton-3.6.0/installed
	.venv-triton-3.6.0/bin/python bench/gpu/pack.py --python $(GPU_PYTHON)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

# The wheel and the sdist, installed beside Hugging Face's `kernels`, used from another folder, and removed again.
wheel: .venv/installed
	$(BIN)/python tests/helpers/wheel_check.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# A venv that borrows the packages of .venv through a path file: torch lies on the disk once.
define borrowing
	$(BIN)/python -m venv $(1)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(1)/lent.pth
	mv $(1)/lent.pth $(1)/lib/python*/site-packages/
endef

# Only triton is another one, and numpy: Triton 3.6's interpreter fails with 2.4, warns with 2.3.
.venv-triton-%/installed: .venv/installed
	$(call borrowing,.venv-triton-$*)
	.venv-triton-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==$* 'numpy<2.4'
	touch $@

# What asks for packages that cannot be here. fastai: torchvision, whose wheel does not load next to torch's CPU build (and
# which Transformers would import), and spaCy. torchtitan: an older `datasets` than trl. Training imports none of them.
WITHOUT_NEEDS := fastai fastcore fastdownload fastprogress fasttransform plum-dispatch torchtitan

.venv-torch-%/installed: pyproject.toml
	$(lastword $(subst -, ,$*)) -m venv .venv-torch-$*
	.venv-torch-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==$(firstword $(subst -, ,$*)) 'numpy<2.4' -e '.[dev]'
	touch $@

# pip finds torch installed, and adds the frameworks and what they need alone.
.venv-integrations/installed: .venv/installed
	$(call borrowing,.venv-integrations)
	.venv-integrations/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[integrations]'
	.venv-integrations/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(WITHOUT_NEEDS)
	touch $@

clean:
	rm -rf .venv .venv-triton-* .venv-torch-* .venv-integrations .gpu build dist *.egg-info .pytest_cache .ptx_cache .mypy_cache .ruff_cache .hypothesis demo.png bench.png convergence.png
