# SPDX-License-Identifier: MIT
# Thin targets over CMake's presets. `make help` lists them; ./do installs the packages they need and calls this file.
SHELL := /bin/sh
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# What `make build` and `make demo` use, and what `make test` goes through.
PRESET ?= host
# With nvcc the preset cuda, which builds and tests all that host does and more, takes the place of host.
NVCC := $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
PRESETS ?= $(if $(NVCC),cuda,host) host-asan host-tsan
# More arguments for the demo or the benchmark: make demo ARGS="--text book.txt"
ARGS ?=

.PHONY: build demo test framework-test cluster-test bench cluster-bench lint asan tsan format clean help
.DEFAULT_GOAL := build

build:  ## build the library and all programs (PRESET=host)
	cmake --preset $(PRESET)
	cmake --build --preset $(PRESET) -j $(JOBS)

demo:  ## eight ranks run an MoE layer over real text; report in out/demo (ARGS=...)
	cmake --preset $(PRESET)
	cmake --build --preset $(PRESET) -j $(JOBS) --target moe_layer
	build/$(PRESET)/examples/moe_layer $(ARGS)

test:  ## all presets' tests, lint, Python tests, one summary line (PRESETS="host host-asan host-tsan"; cuda for host where nvcc is)
	@python3 tools/run_tests.py --jobs $(JOBS) $(PRESETS)

framework-test:  ## frameworks' own code on this library, each installed from PyPI into build/frameworks (ARGS=megatron: only that one)
	@python3 tools/framework_test.py $(ARGS)

cluster-test:  ## ranks across network namespaces of this machine, with cut links and killed ranks; as root (ARGS=...)
	cmake --preset $(PRESET)
	cmake --build --preset $(PRESET) -j $(JOBS) --target cluster_rank_main
	python3 tools/cluster_test.py --build build/$(PRESET) $(ARGS)

asan:  ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@python3 tools/run_tests.py --jobs $(JOBS) --no-lint host-asan

tsan:  ## the tests under ThreadSanitizer
	@python3 tools/run_tests.py --jobs $(JOBS) --no-lint host-tsan

bench:  ## measure, beside memcpy and Open MPI, then from Python beside gloo; reports in out/bench (ARGS=...)
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target bench/all
	mkdir -p out/bench
	python3 bench/run.py --build build/release --out out/bench $(ARGS)

cluster-bench:  ## measure across two network namespaces, beside iperf3, Open MPI and libfabric alone; as root; report in out/bench (ARGS=...)
	cmake --preset release
	cmake --build --preset release -j $(JOBS) --target internode_exchange mpi_exchange fabric_raw
	python3 bench/internode.py --build build/release --out out/bench $(ARGS)

lint:  ## includes, documents, format, clang-tidy
	cmake --preset host
	@JOBS=$(JOBS) tools/lint.sh

format:  ## run clang-format over the tree
	@tools/lint.sh --format

clean:  ## remove build/ and out/
	rm -rf build out

help:  ## this list
	@sed -n 's/^\([a-z-]*\):  *## /\1 - /p' Makefile | awk -F' - ' '{ printf "  make %-14s %s\n", $$1, $$2 }'
