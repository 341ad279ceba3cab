package compile_test

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/controlplane/compile"
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

const reference = "../../docs/config.md"

// TestReferenceIsTrue: every example of docs/config.md is accepted, the first compiles without a
// finding, and the table of codes is that of the code.
func TestReferenceIsTrue(t *testing.T) {
	data, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(data), -1)
	if len(blocks) < 5 {
		t.Fatalf("%d examples, want one for each kind and a whole one", len(blocks))
	}
	for i, b := range blocks {
		set, findings := config.Parse([]source.File{{Path: fmt.Sprintf("example%d.yaml", i), Data: []byte(b[1])}})
		for _, f := range findings {
			t.Errorf("example %d: %s", i, f)
		}
		if i > 0 {
			continue
		}
		if mesh, findings := compile.Compile(compile.Input{Set: set, TrustDomain: "inlay.local"}); mesh == nil || len(findings) > 0 {
			t.Errorf("the whole example does not compile: %v", findings)
		}
	}
	for _, c := range object.Codes {
		row := fmt.Sprintf("| `%s` | %s | %s |\n", c.Code, c.Name, c.Text)
		if !strings.Contains(string(data), row) {
			t.Errorf("%s lacks the row %s", reference, row)
		}
	}
	if got := strings.Count(string(data), "| `INL"); got != len(object.Codes) {
		t.Errorf("%s has %d codes, want %d", reference, got, len(object.Codes))
	}
}
