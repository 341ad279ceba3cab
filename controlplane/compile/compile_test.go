package compile_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/inlay-mesh/inlay/controlplane/compile"
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestCompile reads YAML files, instances.json and addresses.json of each archive; "ir" and
// "findings" are what they must become.
func TestCompile(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no golden files (%v)", err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			in := input(t, ar)
			mesh, findings := compileAll(t, in)
			var b strings.Builder
			for _, f := range findings {
				b.WriteString(f.Severity.String() + " " + f.String() + "\n")
			}
			compare(t, path, ar, map[string]string{"ir": dumpMesh(mesh), "findings": b.String()})
			if (mesh == nil) != config.HasFaults(findings) {
				t.Errorf("mesh is nil: %v, faults: %v; want both or neither", mesh == nil, config.HasFaults(findings))
			}
			again, _ := compileAll(t, input(t, ar))
			if !reflect.DeepEqual(mesh, again) {
				t.Error("compiled twice, the meshes differ")
			}
		})
	}
}

type archive struct {
	files     []source.File
	instances registry.Snapshot
}

// addresses are virtual ones by NAMESPACE/NAME.
type addresses map[string][]netip.Addr

func (a addresses) Of(namespace, service string) []netip.Addr { return a[namespace+"/"+service] }

func (a addresses) Range() string { return "198.18.0.0/30" }

func input(t *testing.T, ar *txtar.Archive) archive {
	t.Helper()
	var in archive
	for _, f := range ar.Files {
		switch filepath.Ext(f.Name) {
		case ".yaml", ".yml":
			in.files = append(in.files, source.File{Path: f.Name, Data: f.Data})
		case ".json":
			dec := json.NewDecoder(strings.NewReader(string(f.Data)))
			dec.DisallowUnknownFields()
			var into any = &in.instances.Instances
			if f.Name == "addresses.json" {
				a := addresses{}
				in.instances.Addresses, into = a, &a
			}
			if err := dec.Decode(into); err != nil {
				t.Fatalf("%s: %v", f.Name, err)
			}
		}
	}
	return in
}

func compileAll(t *testing.T, in archive) (*ir.Mesh, []config.Finding) {
	t.Helper()
	set, findings := config.Parse(in.files)
	mesh, more := compile.Compile(compile.Input{Set: set, Instances: in.instances, TrustDomain: "inlay.local", Revision: "r1"})
	return mesh, config.SortFindings(append(findings, more...))
}

func compare(t *testing.T, path string, ar *txtar.Archive, got map[string]string) {
	t.Helper()
	for _, name := range []string{"ir", "findings"} {
		i := slices.IndexFunc(ar.Files, func(f txtar.File) bool { return f.Name == name })
		if i < 0 {
			ar.Files = append(ar.Files, txtar.File{Name: name})
			i = len(ar.Files) - 1
		}
		if *update {
			ar.Files[i].Data = []byte(got[name])
		} else if string(ar.Files[i].Data) != got[name] {
			t.Errorf("%s:\n%s\nwant:\n%s", name, got[name], ar.Files[i].Data)
		}
	}
	if *update {
		if err := os.WriteFile(path, txtar.Format(ar), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// dumpMesh writes a mesh as text, one line a value, zero fields left out.
func dumpMesh(m *ir.Mesh) string {
	if m == nil {
		return ""
	}
	var b strings.Builder
	dump(&b, "", "mesh", reflect.ValueOf(*m))
	return b.String()
}

// flat are the structs whose lists stand in one line.
var flat = map[reflect.Type]bool{
	reflect.TypeFor[netip.AddrPort](): true, reflect.TypeFor[netip.Addr](): true, reflect.TypeFor[netip.Prefix](): true,
	reflect.TypeFor[ir.HeaderMatch](): true,
}

func dump(b *strings.Builder, indent, label string, v reflect.Value) {
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return
		}
		v = v.Elem()
	}
	line, nested := "", []int{}
	for i := range v.NumField() {
		f, name := v.Field(i), v.Type().Field(i).Name
		switch {
		case f.Kind() == reflect.Slice && f.Type().Elem().Kind() == reflect.Struct && !flat[f.Type().Elem()]:
			nested = append(nested, i)
		case f.Type() == reflect.TypeFor[ir.ClusterPolicy]() || f.Type() == reflect.TypeFor[*ir.Retry]():
			nested = append(nested, i)
		case f.IsZero():
		default:
			line += " " + name + "=" + text(f)
		}
	}
	fmt.Fprintf(b, "%s%s%s\n", indent, label, line)
	for _, i := range nested {
		f, name := v.Field(i), v.Type().Field(i).Name
		if f.Kind() != reflect.Slice {
			dump(b, indent+"  ", name, f)
			continue
		}
		for j := range f.Len() {
			dump(b, indent+"  ", singular(name), f.Index(j))
		}
	}
}

func singular(name string) string {
	switch name {
	case "Ingress", "Egress":
		return name
	case "NetworkPolicies":
		return "NetworkPolicy"
	}
	return strings.TrimSuffix(name, "s")
}

func text(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case ir.Source:
		return fmt.Sprintf("%s:%d:%d", x.File, x.Line, x.Col)
	case time.Duration:
		return x.String()
	case ir.Protocol:
		return []string{"HTTP", "HTTP2", "GRPC", "TCP", "UDP"}[x]
	case ir.Transport:
		return []string{"any", "TCP", "UDP", "ICMP"}[x]
	case ir.Entity:
		return []string{"none", "host", "world", "mesh"}[x]
	case ir.Selector:
		return fmt.Sprintf("{%s/%s %v}", x.Namespace, x.Service, x.Labels)
	case ir.MTLS:
		return []string{"strict", "permissive"}[x]
	case ir.PathKind:
		return []string{"any", "exact", "prefix", "suffix"}[x]
	case ir.LB:
		return []string{"LeastRequest", "RoundRobin"}[x]
	case ir.Health:
		return []string{"healthy", "draining", "unhealthy"}[x]
	case string:
		return fmt.Sprintf("%q", x)
	case ir.Match:
		return strings.TrimSpace(fmt.Sprintf("{%s %s %s %v}", text(reflect.ValueOf(x.PathKind)), x.Path, x.Method, x.Headers))
	}
	return fmt.Sprint(v.Interface())
}
