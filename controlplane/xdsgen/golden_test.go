package xdsgen_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/inlay-mesh/inlay/controlplane/compile"
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/source"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// Each golden file holds mesh.yaml (configuration) or mesh.json (an ir.Mesh) and what each view of
// it must hold: a section is named KIND NAMESPACE/SERVICE (node alone), or "faults", or "routes" for what admin
// says of them.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("golden files: %v, %v", files, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			m := readMesh(t, a.Files[0])
			for i := range a.Files[1:] {
				f := &a.Files[i+1]
				got := section(t, m, f.Name)
				if *update {
					f.Data = []byte(got)
				} else if got != string(f.Data) {
					t.Errorf("%s: section %q differs (go test -update rewrites):\n%s", file, f.Name, firstDifference(got, string(f.Data)))
				}
			}
			if *update {
				if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func readMesh(t *testing.T, f txtar.File) *ir.Mesh {
	t.Helper()
	if f.Name == "mesh.yaml" {
		set, findings := config.Parse([]source.File{{Path: f.Name, Data: f.Data}})
		m, more := compile.Compile(compile.Input{Set: set, TrustDomain: "inlay.local", Revision: "r1"})
		if m == nil {
			t.Fatalf("mesh.yaml: %v %v", findings, more)
		}
		return m
	}
	dec := json.NewDecoder(bytes.NewReader(f.Data))
	dec.DisallowUnknownFields()
	m := new(ir.Mesh)
	if err := dec.Decode(m); err != nil {
		t.Fatalf("%s: %v", f.Name, err)
	}
	return m
}

func section(t *testing.T, m *ir.Mesh, name string) string {
	t.Helper()
	switch name {
	case "faults":
		_, err := xdsgen.New(m, nil)
		return fmt.Sprintln(err)
	case "routes":
		return routes(m)
	}
	kind, class, _ := strings.Cut(name, " ")
	ns, svc, _ := strings.Cut(class, "/")
	v := xdsgen.View{Kind: xdsgen.SDK, Namespace: ns, Service: svc}
	switch kind {
	case "grpc":
		v.Kind = xdsgen.GRPC
	case "node":
		v = xdsgen.View{Kind: xdsgen.Node}
	}
	set, _ := xdsgen.Generate(m, v)
	var out strings.Builder
	for _, typeURL := range []string{xdsgen.ListenerType, xdsgen.RouteType, xdsgen.ClusterType, xdsgen.EndpointsType, xdsgen.NodeServiceType, xdsgen.NodePoliciesType} {
		byName := set.Resources[typeURL]
		for _, name := range slices.Sorted(maps.Keys(byName)) {
			r := byName[name]
			fmt.Fprintf(&out, "# %s %q version %s", typeURL[strings.LastIndexByte(typeURL, '.')+1:], name, r.Version)
			if r.Instances != nil {
				fmt.Fprintf(&out, " instances %v", r.Instances)
			}
			fmt.Fprintf(&out, "\n%s\n", indent(t, r))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(set.Withheld)) {
		fmt.Fprintf(&out, "# withheld %q: %s\n", name, set.Withheld[name])
	}
	return out.String()
}

func routes(m *ir.Mesh) string {
	views, _ := xdsgen.New(m, nil)
	var out strings.Builder
	for i := range m.Services {
		s := &m.Services[i]
		for j := range s.Ports {
			for n := range s.Ports[j].Routes {
				r := &s.Ports[j].Routes[n]
				for _, k := range xdsgen.Callers() {
					fmt.Fprintf(&out, "%s.%s:%d %s/%s %s: %s\n", s.Name, s.Namespace, s.Ports[j].Number, r.Object, r.Rule,
						k, views.RouteStatus(k, s, &s.Ports[j], r))
				}
			}
		}
	}
	return out.String()
}

// indent prints a resource the same way each time: protojson itself varies its white space.
func indent(t *testing.T, r *xdsgen.Resource) string {
	t.Helper()
	raw, err := protojson.Marshal(r.Any)
	if err != nil {
		t.Fatalf("%s: %v", r.Name, err)
	}
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatal(err)
	}
	sorted, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(sorted)
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range g {
		if i >= len(w) || g[i] != w[i] {
			have := "end of file"
			if i < len(w) {
				have = w[i]
			}
			return fmt.Sprintf("line %d:\n got  %s\n want %s", i+1, g[i], have)
		}
	}
	return fmt.Sprintf("line %d: got the end, want %s", len(g), w[len(g)])
}
