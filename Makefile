# The two commands of the README are `make demo` and `make test`. Both install what they need on a
# fresh machine that has Go; everything else is a step of them that can be run alone.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Each module is built as its users see it: outside the workspace.
export GOWORK := off
MODULES := . controlplane ebpf cmd/inlay meshsdk/meshtest examples interop
TOOLS := $(CURDIR)/.tools
GENERATED := proto/inlay/xds xds/xdspb xds/meshpb identity/workloadpb controlplane/admin/adminconnect cmd/inlay/demopb examples/hellopb ebpf/bpfobj

.PHONY: help
help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

.PHONY: build
build: ## Build bin/inlay
	cd cmd/inlay && go build -o ../../bin/inlay .

.PHONY: demo
demo: build ## Five services in a mesh, live traffic, a summary (FOR=20s)
	./bin/inlay demo --for $(or $(FOR),20s)

.PHONY: demo-legacy
demo-legacy: build ## curl and a Python server in the mesh by eBPF, as root (FOR=20s)
	./bin/inlay demo-legacy --for $(or $(FOR),20s)

.PHONY: test
test: deps lint vet generated allocations race ## All checks of every module; ends in the test runner's lines

.PHONY: deps
deps: ## Install what the tests need: C compilers (race detector, eBPF), namespaces, Python with grpcio (interop)
	@command -v gcc >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends gcc libc6-dev; }
	@missing=; for p in clang:clang llvm-strip:llvm ip:iproute2 nsenter:util-linux curl:curl iptables-nft:iptables; do \
		command -v $${p%%:*} >/dev/null || missing="$$missing $${p##*:}"; done; \
	test -e /usr/include/bpf/bpf_helpers.h || missing="$$missing libbpf-dev"; \
	test -e /usr/include/linux/bpf.h || missing="$$missing linux-libc-dev"; \
	test -z "$$missing" || { apt-get update -q && apt-get install -qy --no-install-recommends $$missing; }
	@command -v git >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends git; }
	@command -v python3 >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends python3 python3-venv; }
	@python3 -c 'import venv, ensurepip' 2>/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends python3-venv; }
	@test -x $(TOOLS)/venv/bin/python || python3 -m venv $(TOOLS)/venv
	@cmp -s interop/requirements.txt $(TOOLS)/venv/installed.txt || { \
		$(TOOLS)/venv/bin/python -m pip install --quiet --disable-pip-version-check -r interop/requirements.txt && \
		cp interop/requirements.txt $(TOOLS)/venv/installed.txt; }

$(TOOLS)/golangci-lint: tools/go.mod tools/go.sum
	mkdir -p $(TOOLS)
	cd tools && go build -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: lint
lint: $(TOOLS)/golangci-lint ## golangci-lint, pinned in tools/go.mod
	for m in $(MODULES) tools; do (cd $$m && $(TOOLS)/golangci-lint run --config $(CURDIR)/.golangci.yml ./...); done

.PHONY: vet
vet: ## go vet
	for m in $(MODULES) tools; do (cd $$m && go vet ./...); done

.PHONY: generate
generate: ## Write generated files anew
	cd tools && go run ./xdstrim > ../proto/inlay/xds/v3/xds.proto.new && mv ../proto/inlay/xds/v3/xds.proto.new ../proto/inlay/xds/v3/xds.proto
	cd tools && go run ./protogen ..
	ebpf/bpf/generate.sh

.PHONY: generated
generated: ## Fail when a generated file is not what its source makes of it
	@before=$$(find $(GENERATED) -type f | sort | xargs sha256sum); \
	$(MAKE) --no-print-directory generate; \
	after=$$(find $(GENERATED) -type f | sort | xargs sha256sum); \
	if [ "$$before" != "$$after" ]; then \
		echo "generated files were not current; commit what make generate wrote:"; \
		diff <(echo "$$before") <(echo "$$after") | sed 's/^/  /'; exit 1; fi

.PHONY: allocations
allocations: ## The allocation tests, which the race detector would falsify
	go test -run Alloc ./meshsdk/...

.PHONY: race
race: ## go test -race in every module
	@failed=; for m in tools $(MODULES); do \
		(cd $$m && INLAY_PYTHON=$(TOOLS)/venv/bin/python go test -race -timeout 20m ./...) || failed="$$failed $$m"; done; \
	if [ -n "$$failed" ]; then echo "FAIL in modules:$$failed"; exit 1; fi

.PHONY: tidy
tidy: ## go mod tidy in every module
	for m in $(MODULES) tools; do (cd $$m && go mod tidy); done

.PHONY: bench
bench: ## The cost of the SDK beside plain grpc-go and net/http, of connect() beside iptables, as ratios (interop/bench)
	cd interop && go test ./bench -v -count=1 -args -rounds=31 -round=200ms
	cd interop && go test ./bench/connect -v -count=1 -args -rounds=15

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin .tools
