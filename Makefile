# Every target does the set-up that it needs; a set-up that is complete is skipped in a second or two.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

DURATION ?= 20
REPORT ?= demo_report
MINUTES ?= 30

.PHONY: help setup demo test test-all faults soak parity-env docs lint kernels sample-bag clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## .venv with everything, install/ built, flashrt in .venv/bin; source scripts/env.sh afterwards
	@scripts/setup.sh

demo: setup  ## Pi0.5 drives a simulated arm over ROS 2 topics for DURATION=20 seconds; writes demo_report/
	@scripts/demo.sh --duration "$(DURATION)" --report "$(REPORT)"

test: setup  ## style, types, package.xml, kernel compilation and the fast tests
	@scripts/test.sh fast

test-all: setup parity-env  ## also the slow tests: soak, fuzz, kill, parity; those for a GPU where there is one
	@scripts/test.sh all

faults: setup  ## every row of the fault matrix on the simulated robot; rewrites the table of docs/faults.md
	@FLASHRT_FAULT_TABLE=docs/faults.md scripts/in_env.sh python -m pytest -m faults test/faults

soak: setup  ## the node for MINUTES=30 under random faults and prompt changes: deadlines, memory, threads
	@FLASHRT_SOAK_MINUTES="$(MINUTES)" scripts/in_env.sh python -m pytest -s -m soak test/faults

parity-env: setup  ## .venv-parity: LeRobot and openpi, to compare with (about 1.5 GB; torch is shared with .venv)
	@scripts/parity_env.sh

docs: setup  ## the documentation site, into build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 scripts/in_env.sh mkdocs build --quiet --strict && echo "build/site/index.html"

lint: setup  ## ruff, mypy, clang-format, package.xml
	@scripts/lint.sh

kernels: setup  ## native kernels for every supported GPU architecture, into build/kernels
	@scripts/kernels.sh

sample-bag: setup  ## rosbag2 of the demo robot: OUT=directory DURATION=seconds
	@test -n "$(OUT)" || { echo "make sample-bag: name the directory to write: OUT=my_bag" >&2; exit 1; }
	@scripts/in_env.sh python -P -m flashrt_ros.demo.sample_bag --out "$(OUT)" --duration "$(DURATION)"

clean:  ## remove .venv, .venv-parity, build/, install/, log/ and the demo report
	rm -rf .venv .venv-parity build install log demo_report
