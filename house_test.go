// Package inlay_test holds the house together: who may import whom, what users of the SDK link and
// require, and that messages on the wire only grow.
package inlay_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/inlay-mesh/inlay"

// modules are the directories that hold a go.mod and are part of the house; tools is none of it.
var modules = []string{".", "controlplane", "ebpf", "cmd/inlay", "meshsdk/meshtest", "examples", "interop"}

// rooms says for each room which rooms of the house it may import besides itself, the longest
// prefix of a package's path naming its room. ARCHITECTURE, section 2.
var rooms = map[string][]string{
	"meshsdk":            {"xds", "identity"},
	"xds":                {"identity"},
	"xds/xdspb":          {},
	"xds/meshpb":         {},
	"identity":           {},
	"controlplane":       {"xds/meshpb", "identity"},
	"controlplane/serve": {"controlplane", "xds/meshpb", "identity", "xds/resource"},
	"controlplane/ir":    {},
	"ebpf":               {"xds", "identity"},
	"ebpf/bpfobj":        {},
	"examples":           {"meshsdk", "meshsdk/meshtest"},
	"meshsdk/meshtest":   {"meshsdk", "xds", "identity", "controlplane"},
	"cmd/inlay":          {"meshsdk", "xds", "identity", "controlplane", "ebpf"},
	"interop":            {"meshsdk", "meshsdk/meshtest", "xds", "identity", "controlplane", "ebpf", "examples"},
}

// within a room that has rooms of its own, importing them is free, but for these closed ones.
var closed = []string{"meshsdk/meshtest", "cmd/inlay", "examples", "interop"}

type pkg struct {
	ImportPath string
	Imports    []string
}

func TestArrows(t *testing.T) {
	for _, p := range packages(t) {
		from := strings.TrimPrefix(p.ImportPath, module+"/")
		room, ok := roomOf(from)
		if !ok {
			t.Errorf("package %s is in no room: add it to the house (ARCHITECTURE, section 2) or move it", from)
			continue
		}
		for _, imported := range p.Imports {
			to, ours := strings.CutPrefix(imported, module+"/")
			if !ours || allowed(room, to) {
				continue
			}
			t.Errorf("%s imports %s: room %s may import %v and itself", from, to, room, rooms[room])
		}
	}
}

// TestEngineKnowsNoSkin: nothing in the chain of a call imports gRPC or HTTP.
func TestEngineKnowsNoSkin(t *testing.T) {
	for _, p := range packages(t) {
		name, ok := strings.CutPrefix(p.ImportPath, module+"/meshsdk/internal/")
		if !ok || !slices.Contains([]string{"call", "apply", "route", "balance", "endpoint", "limit", "retry"}, name) {
			continue
		}
		for _, i := range p.Imports {
			if i == "net/http" || strings.HasPrefix(i, "google.golang.org/grpc") {
				t.Errorf("meshsdk/internal/%s imports %s", name, i)
			}
		}
	}
}

func roomOf(path string) (string, bool) {
	best := ""
	for r := range rooms {
		if (path == r || strings.HasPrefix(path, r+"/")) && len(r) > len(best) {
			best = r
		}
	}
	return best, best != ""
}

func allowed(room, to string) bool {
	target, ok := roomOf(to)
	if !ok {
		return false
	}
	for _, may := range append([]string{room}, rooms[room]...) {
		if to == may || strings.HasPrefix(to, may+"/") {
			return target == may || target == room || !slices.Contains(closed, target)
		}
	}
	return false
}

// packages lists every package of the house with the imports of its non-test files.
func packages(t *testing.T) []pkg {
	t.Helper()
	var all []pkg
	for _, m := range modules {
		d := json.NewDecoder(bytes.NewReader(goRun(t, m, "list", "-json=ImportPath,Imports", "./...")))
		for {
			var p pkg
			err := d.Decode(&p)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("go list in %s: %v", m, err)
			}
			if p.ImportPath != module { // this package: tests only
				all = append(all, p)
			}
		}
	}
	return all
}

// goRun runs the go command in a directory, outside the workspace: as users of a module see it.
func goRun(t *testing.T, dir string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=mod")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s in %s: %v\n%s", strings.Join(args, " "), dir, err, stderr.Bytes())
	}
	return out
}

// consumer is a fresh module that uses the SDK, and baseline one that uses what it stands on.
const (
	consumer = `package main

import (
	"context"

	"` + module + `/meshsdk"
)

func main() {
	m, err := meshsdk.Open(context.Background())
	if err != nil {
		panic(err)
	}
	_ = m.Close()
}
`
	baseline = `package main

import (
	_ "github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	_ "github.com/spiffe/go-spiffe/v2/spiffeid"
	_ "github.com/spiffe/go-spiffe/v2/svid/x509svid"
	_ "go.opentelemetry.io/otel"
	_ "go.opentelemetry.io/otel/metric"
	_ "go.opentelemetry.io/otel/trace"
	_ "google.golang.org/grpc"
)

func main() {}
`
)

// TestConsumer builds a fresh module with the SDK and looks at what it links and requires.
func TestConsumer(t *testing.T) {
	if testing.Short() {
		t.Skip("needs the module proxy; not run with -short, which CI does not set")
	}
	root, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	var versions []string
	for _, m := range []string{"google.golang.org/grpc", "go.opentelemetry.io/otel", "go.opentelemetry.io/otel/metric", "go.opentelemetry.io/otel/trace", "github.com/spiffe/go-spiffe/v2"} {
		v := strings.TrimSpace(string(goRun(t, ".", "list", "-m", "-f", "{{.Path}} {{.Version}}", m)))
		versions = append(versions, v)
	}
	require := "require (\n\t" + strings.Join(versions, "\n\t") + "\n)\n"
	user := freshModule(t, consumer, require+"\nrequire "+module+" v0.0.0\n\nreplace "+module+" => "+root+"\n")
	plain := freshModule(t, baseline, require)

	for _, dep := range strings.Fields(string(goRun(t, user, "list", "-deps", "."))) {
		for _, no := range []string{"k8s.io/", "sigs.k8s.io/", "go.etcd.io/", "istio.io/", "github.com/envoyproxy/", "github.com/cncf/xds", "github.com/prometheus/", "go.uber.org/fx", "cel.dev/", "github.com/google/cel-go", "connectrpc.com/", "github.com/tetratelabs/wazero", "go.opentelemetry.io/otel/sdk"} {
			if strings.HasPrefix(dep, no) {
				t.Errorf("a user of the SDK links %s", dep)
			}
		}
	}
	have := requires(t, plain)
	for m := range requires(t, user) {
		if !have[m] && m != module && m != "fresh" {
			t.Errorf("a user of the SDK requires module %s, which grpc, go-spiffe and the OTel API alone do not", m)
		}
	}
	goRun(t, user, "build", "-o", os.DevNull, ".")
}

func freshModule(t *testing.T, source, requirements string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"go.mod": "module fresh\n\ngo 1.26.0\n\n" + requirements, "main.go": source} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	goRun(t, dir, "mod", "tidy")
	return dir
}

func requires(t *testing.T, dir string) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	for _, m := range strings.Fields(string(goRun(t, dir, "list", "-m", "-f", "{{.Path}}", "all"))) {
		out[m] = true
	}
	return out
}
