package config_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
)

// TestEveryCodeHasAnExample: each code is unique, ordered, and shown by a golden file of this
// package or of compile, with its own severity.
func TestEveryCodeHasAnExample(t *testing.T) {
	var golden strings.Builder
	for _, pattern := range []string{"testdata/*/*.txtar", "../compile/testdata/*.txtar"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			data, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			golden.Write(data)
		}
	}
	last := object.Code("")
	for _, c := range object.Codes {
		if c.Code <= last {
			t.Errorf("code %s stands behind %s", c.Code, last)
		}
		last = c.Code
		if !strings.Contains(golden.String(), " "+string(c.Code)+" ") {
			t.Errorf("no golden file shows %s (%s)", c.Code, c.Name)
		}
		want := config.Fault
		if strings.HasPrefix(string(c.Code), "INL2") {
			want = config.Warning
		}
		if got := c.Code.Severity(); got != want {
			t.Errorf("%s is a %s, want a %s", c.Code, got, want)
		}
	}
}
