# make demo | app | test | lint | docs | bench. Each makes .venv and installs what it needs, once; only Python >= 3.11, pip and make are assumed.
#   SAMED3D_VENV=DIR   use (or make) that environment instead of .venv
#   PYTHON=python3.12  make the environment with that interpreter
#   ARGS="..."         further arguments of the command
PYTHON ?= python3
VENV := $(or $(SAMED3D_VENV),.venv)
PY := $(VENV)/bin/python
CORE := $(VENV)/.samed3d-core
DEV := $(VENV)/.samed3d-dev
MANIFEST := setup.cfg pyproject.toml constraints-cpu.txt

# Without an NVIDIA GPU every pip call is held to the CPU build of torch: one call without it may bring several GB of CUDA packages.
GPU := $(shell command -v nvidia-smi 2>/dev/null)
PIP := $(PY) -m pip --disable-pip-version-check
CONSTRAINT := $(if $(GPU),,-c constraints-cpu.txt)
# pip's own torch for Linux may be the CUDA build. TORCH_INDEX=URL names the index of CPU wheels that pytorch.org's install page gives.
TORCH_INDEX ?=

NEEDED_CORE := samed3d torch numpy scipy SimpleITK pydicom einops safetensors edt cc3d typer rich yaml PIL httpx fastapi uvicorn multipart blosc2 prometheus_client psutil packaging
NEEDED_DEV := $(NEEDED_CORE) jinja2 matplotlib accelerate torchio highdicom joblib distributed timm onnx onnxscript onnxruntime huggingface_hub skimage pytest xdist pytest_timeout hypothesis ruff mypy
# True where an environment that already existed holds all of these packages (-I: do not count this folder itself).
HAS = $(PY) -I -c "import sys; from importlib.util import find_spec; sys.exit(any(find_spec(n) is None for n in sys.argv[1:]))"

.PHONY: demo app viewer test test-browser lint docs bench help
help:
	@sed -n '1,4s/^# *//p' Makefile

demo: $(CORE)
	$(PY) -m samed3d demo -o out/demo $(ARGS)

app: viewer
	$(PY) -m samed3d app $(ARGS)

# The published build of the web viewer, by npm; needs node once, not at run time.
viewer: $(CORE)
	$(PY) -m samed3d.apps.viewer_build

test: $(DEV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

# The web page in headless chromium, which must be installed; skipped with the reason where it is not.
test-browser: $(DEV) viewer
	$(PIP) install -q $(CONSTRAINT) -e '.[e2e]'
	$(PY) -m pytest -m browser $(ARGS)

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The pages of docs/ and the API reference as a site, in site/. A warning is an error.
docs: $(DEV)
	$(PIP) install -q $(CONSTRAINT) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(DEV)
	$(PY) benchmarks/collect.py $(ARGS)

$(PY):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "samed3d needs Python 3.11 or later; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "samed3d: making the environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install pip; }

# One line of text, then pip's own. $(1): what is being installed, $(2): the packages that must be there, $(3): pip's arguments.
define install
	@if $(HAS) $(2); then echo "samed3d: $(VENV) already holds $(1)"; else \
	  if [ -z "$(GPU)" ] && ! $(HAS) torch; then \
	    echo "samed3d: no NVIDIA GPU here, installing torch for the CPU first (about 200 MB to download)"; \
	    $(PIP) install -q $(CONSTRAINT) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch || exit 1; \
	  fi && \
	  echo "samed3d: installing $(1) into $(VENV), once; this takes one to three minutes" && \
	  $(PIP) install -q $(CONSTRAINT) -e '$(3)' && echo "samed3d: installed"; \
	fi
	@touch $@
endef

$(CORE): $(MANIFEST) | $(PY)
	$(call install,samed3d and what it runs with,$(NEEDED_CORE),.)

$(DEV): $(MANIFEST) | $(PY)
	$(call install,samed3d with its training and test tools,$(NEEDED_DEV),.[dev])
