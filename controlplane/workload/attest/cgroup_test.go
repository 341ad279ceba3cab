package attest

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPopulated(t *testing.T) {
	for name, tc := range map[string]struct {
		events string
		want   bool
		err    string
	}{
		"processes live in it":        {"populated 1\nfrozen 0\n", true, ""},
		"nobody is left":              {"populated 0\nfrozen 0\n", false, ""},
		"the line stands last":        {"frozen 0\npopulated 1\n", true, ""},
		"a file of something else":    {"oom 3\n", false, "no line populated"},
		"an empty file":               {"", false, "no line populated"},
		"a word that begins alike":    {"populated_before 1\n", false, "no line populated"},
		"a line that is not finished": {"populated 1", true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "cgroup.events"), []byte(tc.events), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := Populated(dir)
			if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%v, %v; want %v, %q", got, err, tc.want, tc.err)
			}
		})
	}
	if got, err := Populated(filepath.Join(t.TempDir(), "gone")); got || err != nil {
		t.Errorf("a cgroup that is gone: %v, %v; want empty", got, err)
	}
}

// The wait ends by the event, by stop, by the end of the context, and at once for what is gone.
func TestWaitCgroupEmpty(t *testing.T) {
	dir := t.TempDir()
	events := filepath.Join(dir, "cgroup.events")
	write := func(text string) {
		t.Helper()
		// In place and of one length: like the kernel's file, it is never empty.
		f, err := os.OpenFile(events, os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte(text), 0); err != nil {
			t.Fatal(err)
		}
	}
	write("populated 1\nfrozen 0\n")
	ended := make(chan error, 1)
	go func() { ended <- WaitCgroupEmpty(t.Context(), dir, nil) }()
	write("populated 1\nfrozen 1\n")
	select {
	case err := <-ended:
		t.Fatalf("it ended while processes live: %v", err)
	default:
	}
	write("populated 0\nfrozen 0\n")
	if err := <-ended; err != nil {
		t.Error(err)
	}
	write("populated 1\nfrozen 0\n")
	stop := make(chan struct{})
	close(stop)
	if err := WaitCgroupEmpty(t.Context(), dir, stop); err != nil {
		t.Errorf("stopped: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := WaitCgroupEmpty(ctx, dir, nil); err != nil {
		t.Errorf("context: %v", err)
	}
	if err := WaitCgroupEmpty(t.Context(), filepath.Join(dir, "gone"), nil); err != nil {
		t.Errorf("gone: %v", err)
	}
}
