package config_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden runs check on each archive of a pattern: the YAML files in, the file "findings" out.
func golden(t *testing.T, pattern string, check func(t *testing.T, set *config.Set, findings []config.Finding)) {
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		t.Fatalf("no files match %s (%v)", pattern, err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var files []source.File
			want := -1
			for i, f := range ar.Files {
				if f.Name == "findings" {
					want = i
				} else {
					files = append(files, source.File{Path: f.Name, Data: f.Data})
				}
			}
			set, findings := config.Parse(files)
			check(t, set, findings)
			var b strings.Builder
			for _, f := range findings {
				b.WriteString(f.Severity.String() + " " + f.String() + "\n")
			}
			got := b.String()
			if want < 0 {
				ar.Files = append(ar.Files, txtar.File{Name: "findings"})
				want = len(ar.Files) - 1
			}
			if *update {
				ar.Files[want].Data = []byte(got)
				if err := os.WriteFile(path, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if string(ar.Files[want].Data) != got {
				t.Errorf("findings:\n%s\nwant:\n%s", got, ar.Files[want].Data)
			}
		})
	}
}

func TestFaults(t *testing.T) {
	golden(t, "testdata/faults/*.txtar", func(t *testing.T, set *config.Set, findings []config.Finding) {
		if !config.HasFaults(findings) {
			t.Error("no fault found")
		}
		if len(set.Refused) == 0 && !set.Incomplete && set.Len() == 0 {
			t.Error("the set is empty and says nothing of what was refused")
		}
	})
}

func TestGood(t *testing.T) {
	golden(t, "testdata/good/*.txtar", func(t *testing.T, set *config.Set, findings []config.Finding) {
		if config.HasFaults(findings) {
			t.Error("a fault was found")
		}
		if len(set.Refused) != 0 || set.Incomplete {
			t.Errorf("the set is not whole: refused %v, incomplete %v", set.Refused, set.Incomplete)
		}
	})
}

func TestNoFilesAreAnEmptySet(t *testing.T) {
	set, findings := config.Parse(nil)
	if set == nil || set.Len() != 0 || len(findings) != 0 {
		t.Errorf("Parse(nil) = %v, %v; want an empty set without findings", set, findings)
	}
}
