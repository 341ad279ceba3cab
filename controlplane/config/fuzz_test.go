package config_test

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

// withoutPlaces sets every object.Pos in v to zero.
func withoutPlaces(v reflect.Value) {
	if v.Type() == reflect.TypeFor[object.Pos]() {
		v.SetZero()
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			withoutPlaces(v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			withoutPlaces(v.Index(i))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				withoutPlaces(v.Field(i))
			}
		}
	}
}

// roundTrip checks that what Parse accepted parses again as the same set once it is written out.
func roundTrip(t *testing.T, data []byte) {
	t.Helper()
	set, findings := config.Parse([]source.File{{Path: "in.yaml", Data: data}})
	for _, f := range findings {
		if f.Code == "" || f.Message == "" || f.File != "in.yaml" || f.Line < 1 || f.Col < 1 {
			t.Fatalf("finding %+v lacks its code, message or place", f)
		}
	}
	if config.HasFaults(findings) {
		return
	}
	out, err := config.Marshal(set)
	if err != nil {
		t.Fatalf("Marshal: %v", err)
	}
	again, findings := config.Parse([]source.File{{Path: "out.yaml", Data: out}})
	if config.HasFaults(findings) {
		t.Fatalf("what was written has faults: %v\n%s", findings, out)
	}
	withoutPlaces(reflect.ValueOf(set))
	withoutPlaces(reflect.ValueOf(again))
	if !reflect.DeepEqual(set, again) {
		t.Fatalf("read again: %+v\nwas: %+v\n%s", again, set, out)
	}
}

func samples(t testing.TB) [][]byte {
	var out [][]byte
	for _, pattern := range []string{"testdata/good/*.txtar", "testdata/faults/*.txtar", "../compile/testdata/*.txtar"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			data, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range txtar.Parse(data).Files {
				if filepath.Ext(f.Name) == ".yaml" || filepath.Ext(f.Name) == ".yml" {
					out = append(out, f.Data)
				}
			}
		}
	}
	return out
}

func TestMarshalIsReadAgain(t *testing.T) {
	for _, data := range samples(t) {
		roundTrip(t, data)
	}
}

func FuzzParse(f *testing.F) {
	for _, data := range samples(f) {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) { roundTrip(t, data) })
}
