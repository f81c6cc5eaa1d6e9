# fluxkiln: from a FLUX.1 checkpoint to a verified bundle. `make` alone lists what there is; logic is Python.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
# torch of the default index brings CUDA along, several GB that nothing here uses; this index has it without
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TPU_MLIR := $(or $(FLUXKILN_TPU_MLIR),.venv-tpu-mlir)
SD_CPP := $(or $(FLUXKILN_SD_CPP),.venv-sd-cpp)
MLX := $(or $(FLUXKILN_MLX),.venv-mlx)
VENV_MADE := $(VENV)/made-from.sha256
TPU_MLIR_MADE := $(TPU_MLIR)/fluxkiln.json
SD_CPP_MADE := $(SD_CPP)/fluxkiln.json
MLX_MADE := $(MLX)/fluxkiln.json
BIN := $(VENV)/bin

# A Python >= 3.11 that runs: shims of version managers exist for versions that do not.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
NEED_PYTHON = @test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one or name it: make PYTHON=..." >&2; exit 5; }

quoted = '$(subst ','\'',$(1))'
option = $(if $($(1)),--$(2)=$(call quoted,$($(1))))
options = $(foreach pair,$(1),$(call option,$(firstword $(subst :, ,$(pair))),$(lastword $(subst :, ,$(pair)))))
# variable:option of `fluxkiln build`, as fluxkiln/settings.py describes them: of what is built, and of its images too
MODELS = MODEL:model STATISTICS:statistics SIZE:size TOKENS:tokens SCHEME:scheme VAE:vae COMPONENTS:components MODULATION:modulation TP:tp \
	INSTANCE:instance GRANULARITY:granularity FLAGS:flags BOARD:board DEVICES:devices LORA:lora JOBS:jobs
NAMES = $(MODELS) STEPS:steps PROMPTS:prompts SEEDS:seeds
OPTIONS = $(call options,$(NAMES))

# What is given is text: make does not look for variables and functions of its own in it.
$(foreach name,PROMPT PART BUNDLE OUT TARGET QUANT RUNTIME REGISTRY ACCEPT_LICENSE SIGN SEED STEP PORT $(foreach pair,$(NAMES),$(firstword $(subst :, ,$(pair)))),\
	$(eval override $(name) := $$(value $(name))))
# These may have lines of their own, which a recipe has not.
export PROMPT PART

# Of images: a bundle that is there, or the one of the build that the variables name.
BUNDLE_FIRST = bundle=$(if $(BUNDLE),$(call quoted,$(BUNDLE)),"$$($(BIN)/fluxkiln build \
	$(call quoted,$(or $(TARGET),cpu)) $(call options,$(MODELS)) --json | \
	$(BIN)/python -c 'import json, sys; print(json.load(sys.stdin).get("bundle", ""))')") || exit

.PHONY: help env env-tpu-mlir env-sd-cpp env-mlx envs bm1684x bm1688 bm1684x2 trn1 trn2 inf2 cpu gguf mlx generate serve debug report publish bench test check \
	format clean distclean

help:  ## this list
	@grep -hE '^[a-z0-9 -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 17
	@echo
	@echo "Variables: MODEL (a preset, folder or Hugging Face id) STATISTICS=uniform|flux SIZE=WIDTHxHEIGHT,... TOKENS=N,... SCHEME=NAME VAE=kl|tiny COMPONENTS=A,B"
	@echo "  LORA=FILE[:STRENGTH] MODULATION=inline|hoisted JOBS=N STEPS=N PROMPTS=FILE SEEDS=A,B-C"
	@echo "  INSTANCE=NAME TP=N GRANULARITY=block|group:N|whole FLAGS=default|published (trn1, inf2) BOARD=NAME DEVICES=N (bm1684x, bm1688)"
	@echo "Of images: BUNDLE=folder, or TARGET=cpu and the variables above for the build that is made first"

# Where TPU-MLIR cannot be made, imported moulds do: the build says what it lacks.
bm1684x:  ## checkpoint -> verified BM1684X bundle, environments included
	@$(MAKE) --silent --jobs=2 --keep-going env env-tpu-mlir || { test -x $(BIN)/fluxkiln && \
	echo "TPU-MLIR could not be made; going on with the moulds of the store" >&2; }
	@$(BIN)/fluxkiln build bm1684x $(OPTIONS)

bm1688 bm1684x2: env env-tpu-mlir  ## the same for two other chips of Sophgo
	@$(BIN)/fluxkiln build $@ $(OPTIONS)

trn1: env  ## checkpoint -> verified bundle for AWS Trainium, up to the NEFF; TP, INSTANCE, GRANULARITY
	@$(BIN)/fluxkiln build trn1 $(OPTIONS)

trn2: env  ## the same for AWS Trainium 2; TARGET=trn2_lnc1 for logical cores of one physical core
	@$(BIN)/fluxkiln build $(call quoted,$(or $(TARGET),trn2)) $(OPTIONS)

inf2: env  ## the same for AWS Inferentia2
	@$(BIN)/fluxkiln build inf2 $(OPTIONS)

cpu: env  ## checkpoint -> verified bundle for this CPU: RUNTIME=onnxruntime|openvino
	@$(BIN)/fluxkiln build $(call quoted,$(or $(filter-out onnxruntime,$(RUNTIME)),cpu)) $(OPTIONS)

gguf: env  ## checkpoint -> verified GGUF files: QUANT=Q8_0|Q6_K|Q5_K|Q5_1|Q5_0|Q4_K|Q4_1|Q4_0|BF16|F16
	@$(BIN)/fluxkiln build gguf $(call option,QUANT,scheme) $(OPTIONS)

# mflux has one width, which the smallest preset has not.
mlx: env  ## checkpoint -> verified files for mflux: QUANT=4|8|BF16; TARGET=mlx_example for MLX's own FLUX example
	@$(BIN)/fluxkiln build $(call quoted,$(or $(TARGET),mlx)) $(if $(MODEL)$(TARGET),,--model wide-dev --components transformer) \
	$(if $(QUANT),--scheme=$(call quoted,$(patsubst 8,MLX8,$(patsubst 4,MLX4,$(QUANT))))) $(OPTIONS)

generate: env  ## an image: PROMPT="a kiln at night" STEPS, SEED, OUT=images, PROMPTS=file; of BUNDLE or TARGET=cpu
	@test -n "$$PROMPT"$(if $(PROMPTS), || true) || { echo 'error: there is no prompt; give one: PROMPT="..."' >&2; exit 2; }
	@$(BUNDLE_FIRST); \
	$(BIN)/fluxkiln generate --bundle="$$bundle" $(call options,STEPS:steps SEED:seed OUT:out PROMPTS:prompts) \
	$(if $(PROMPT),-- "$$PROMPT")

serve: env  ## a local page that makes images: PORT=7860; of BUNDLE or TARGET=cpu
	@$(BUNDLE_FIRST); $(BIN)/fluxkiln serve --bundle="$$bundle" $(call option,PORT,port)

debug: env  ## the first operation of a part that is out of tolerance: PART=double.07 TARGET=bm1684x STEP=0
	@test -n "$$PART" || { echo "error: no part is named; give one: PART=double.00" >&2; exit 2; }
	@$(BIN)/fluxkiln debug --target=$(call quoted,$(or $(TARGET),bm1684x)) $(call option,STEP,step) $(OPTIONS) -- "$$PART"

report: env  ## write the report of a build again: TARGET=bm1684x
	@$(BIN)/fluxkiln report $(call quoted,$(or $(TARGET),bm1684x)) $(OPTIONS)

publish: env  ## publish a build: REGISTRY=HOST/REPO:TAG TARGET=bm1684x, or BUNDLE=folder; ACCEPT_LICENSE, SIGN
	@test -n $(if $(REGISTRY),set,'') || { echo "error: no registry is named; give one: REGISTRY=HOST/REPO:TAG" >&2; exit 2; }
	@$(BIN)/fluxkiln publish $(call quoted,$(or $(BUNDLE),$(TARGET),bm1684x)) \
	$(if $(REGISTRY),$(call quoted,$(REGISTRY))) \
	$(call option,ACCEPT_LICENSE,accept-license) $(call option,SIGN,sign) $(OPTIONS)

bench: envs  ## measure the figures of docs/benchmarks.md
	@$(BIN)/python -m bench $(BENCH)

test: envs  ## all tests: real compiler, simulator and registry; PYTEST='-k name' picks some
	@.ci/test-tools
	@$(BIN)/python -m pytest $(PYTEST)

check: env  ## ruff, formatting, mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: env  ## let ruff put right what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:  ## remove builds and caches
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache

distclean: clean  ## remove the environments too
	@rm -rf $(VENV) .venv-tpu-mlir .venv-sd-cpp .venv-mlx

env: $(VENV_MADE)  ## the main environment
env-tpu-mlir: $(TPU_MLIR_MADE)  ## TPU-MLIR's own Python 3.10 environment
env-sd-cpp: $(SD_CPP_MADE)  ## stable-diffusion.cpp, built from source (10 minutes), for tests and figures of GGUF files
env-mlx: $(MLX_MADE)  ## MLX and mflux, for tests of their files

# All at once: installing is mostly unpacking.
envs:
	@$(MAKE) --silent --jobs=3 env env-tpu-mlir env-mlx

# Made again when the content of these files changes, not when a checkout touches them. The bytecode is written here,
# by all cores: pip does it on one, and where PYTHONDONTWRITEBYTECODE is set nobody would.
$(VENV_MADE): pyproject.toml constraints.txt
	$(NEED_PYTHON)
	@if sha256sum --check --status $@ 2>/dev/null; then touch $@; exit; fi; set -e; \
	echo "main environment: making it in $(VENV) with $(PYTHON); some minutes, 3 GB, nothing is shown meanwhile" >&2; \
	test -e $@ || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }; \
	cpu=$$($(BIN)/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=10)' \
		$(CPU_INDEX) 2>/dev/null && echo $(CPU_INDEX)) || true; \
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt $${cpu:+--extra-index-url $$cpu} -e '.[dev,trn1,train,openvino]'; \
	$(BIN)/python -c 'import importlib.metadata as m; v = m.version("torch"); \
		print("torch", v + (", without CUDA" if "+cpu" in v else ": no index offered its CPU build, so it brings CUDA; CPU_INDEX=URL names one"))' >&2; \
	$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib fluxkiln || true; \
	sha256sum $^ > $@; \
	echo "main environment: ready" >&2

T := fluxkiln/compile/toolchains/tpu_mlir
$(TPU_MLIR_MADE): $(T)/constraints.txt $(wildcard $(T)/check.py $(T)/deploy.py $(T)/environment.py $(T)/transform.py $(T)/stubs/*) \
		fluxkiln/compile/environment.py
	$(NEED_PYTHON)
	@$(PYTHON) -m fluxkiln.compile.toolchains.tpu_mlir.environment

G := fluxkiln/compile/toolchains/gguf
$(SD_CPP_MADE): $(G)/constraints.txt $(G)/client.py $(G)/environment.py fluxkiln/compile/environment.py
	$(NEED_PYTHON)
	@$(PYTHON) -m fluxkiln.compile.toolchains.gguf.environment

X := fluxkiln/compile/toolchains/mlx
$(MLX_MADE): $(X)/constraints.txt $(X)/environment.py fluxkiln/compile/environment.py
	$(NEED_PYTHON)
	@$(PYTHON) -m fluxkiln.compile.toolchains.mlx.environment
