package source_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/source"
)

func write(t *testing.T, path, data string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

// rename puts a file into place at once, as editors and deployment tools do.
func rename(t *testing.T, path, data string) {
	t.Helper()
	tmp := filepath.Join(filepath.Dir(path), ".tmp-"+filepath.Base(path))
	write(t, tmp, data)
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

func names(r source.Revision) []string {
	out := []string{}
	for _, f := range r.Files {
		out = append(out, f.Path+"="+string(f.Data))
	}
	return out
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	for path, data := range map[string]string{
		"b.yaml": "b", "a.yml": "a", "sub/deep/c.yaml": "c", "readme.md": "x", ".hidden.yaml": "x", ".git/d.yaml": "x",
		"a.yaml~": "x", "#a.yaml#": "x", ".a.yaml.swp": "x", "e.yaml.bak": "x",
	} {
		write(t, filepath.Join(dir, path), data)
	}
	r, err := source.Load(dir, source.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := names(r), []string{"a.yml=a", "b.yaml=b", "sub/deep/c.yaml=c"}; !slices.Equal(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
	one, err := source.Load(filepath.Join(dir, "b.yaml"), source.Limits{})
	if err != nil || !slices.Equal(names(one), []string{"b.yaml=b"}) {
		t.Errorf("one file: %q, %v", names(one), err)
	}
}

func TestRevisionID(t *testing.T) {
	id := func(files ...source.File) string { return source.NewRevision(files).ID }
	a, b := source.File{Path: "a", Data: []byte("1")}, source.File{Path: "b", Data: []byte("2")}
	if id(a, b) != id(b, a) {
		t.Error("the order of files changes the ID")
	}
	for name, other := range map[string]string{
		"a file less":                  id(a),
		"another name":                 id(a, source.File{Path: "c", Data: []byte("2")}),
		"another content":              id(a, source.File{Path: "b", Data: []byte("3")}),
		"bytes moved to the next file": id(source.File{Path: "a", Data: []byte("1b")}, source.File{Path: "", Data: []byte("2")}),
	} {
		if other == id(a, b) {
			t.Errorf("%s does not change the ID", name)
		}
	}
}

func TestLoadFaults(t *testing.T) {
	for name, tc := range map[string]struct {
		make   func(dir string)
		limits source.Limits
		want   []string
	}{
		"a file too large is named, and so is the second": {
			func(dir string) {
				write(t, dir+"/a.yaml", "12345")
				write(t, dir+"/b.yaml", "123456")
				write(t, dir+"/c.yaml", "1")
			}, source.Limits{FileBytes: 4},
			[]string{"a.yaml: 5 bytes: want at most 4", "b.yaml: 6 bytes"},
		},
		"too many files": {
			func(dir string) {
				for _, n := range []string{"a", "b", "c"} {
					write(t, dir+"/"+n+".yaml", "")
				}
			}, source.Limits{Files: 2}, []string{"3 files: want at most 2"},
		},
		"too much in all": {
			func(dir string) { write(t, dir+"/a.yaml", "123"); write(t, dir+"/b.yaml", "123") },
			source.Limits{Bytes: 5}, []string{"6 bytes in all files: want at most 5"},
		},
		"too deep": {
			func(dir string) { write(t, dir+"/1/2/3/a.yaml", "") },
			source.Limits{Depth: 2}, []string{"1/2/3", "nested deeper than 2"},
		},
		"a link that leads nowhere": {
			func(dir string) {
				if err := os.Symlink("gone", dir+"/a.yaml"); err != nil {
					t.Fatal(err)
				}
			}, source.Limits{}, []string{"a.yaml", "no such file"},
		},
		"no directory": {func(dir string) { os.Remove(dir) }, source.Limits{}, []string{"no such file"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "d")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			tc.make(dir)
			_, err := source.Load(dir, tc.limits)
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tc.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
		})
	}
}

func TestLinksAreFollowedButNotInCircles(t *testing.T) {
	dir := t.TempDir()
	elsewhere := t.TempDir()
	write(t, elsewhere+"/a.yaml", "a")
	for link, to := range map[string]string{"other": elsewhere, "self": ".", "up": "sub/.."} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir+"/sub/b.yaml", "b")
	r, err := source.Load(dir, source.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := names(r), []string{"other/a.yaml=a", "sub/b.yaml=b"}; !slices.Equal(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
}

// running is a Dir being watched.
type running struct {
	t         *testing.T
	revisions chan source.Revision
	problems  chan error
}

func run(t *testing.T, dir string, opts source.Options) *running {
	t.Helper()
	r := &running{t, make(chan source.Revision, 100), make(chan error, 100)}
	opts.Problem = func(err error) { r.problems <- err }
	if opts.Rescan == 0 {
		opts.Rescan = time.Hour // only notifications may find a change
	}
	d, err := source.NewDir(dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- d.Run(ctx, func(rev source.Revision) { r.revisions <- rev }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v, want the context's error", err)
		}
	})
	return r
}

// until waits for a revision of exactly these files; steps on the way are allowed.
func (r *running) until(want ...string) source.Revision {
	r.t.Helper()
	var last []string
	for {
		select {
		case rev := <-r.revisions:
			if last = names(rev); slices.Equal(last, want) {
				return rev
			}
		case <-time.After(10 * time.Second):
			r.t.Fatalf("no revision with %q; the last was %q", want, last)
		}
	}
}

func (r *running) problem() error {
	r.t.Helper()
	select {
	case err := <-r.problems:
		return err
	case <-time.After(10 * time.Second):
		r.t.Fatal("no problem was told of, or its end")
	}
	return nil
}

func TestChangesAreSeen(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a.yaml", "1")
	r := run(t, dir, source.Options{})
	r.until("a.yaml=1")
	rename(t, dir+"/a.yaml", "2")
	r.until("a.yaml=2")
	write(t, dir+"/a.yaml", "3") // in place, and of the same size
	r.until("a.yaml=3")
	write(t, dir+"/new/deep/b.yaml", "b") // directories that did not exist
	r.until("a.yaml=3", "new/deep/b.yaml=b")
	rename(t, dir+"/new/deep/b.yaml", "bb")
	r.until("a.yaml=3", "new/deep/b.yaml=bb")
	if err := os.Remove(dir + "/a.yaml"); err != nil {
		t.Fatal(err)
	}
	r.until("new/deep/b.yaml=bb")
	if err := os.Rename(dir+"/new", dir+"/moved"); err != nil {
		t.Fatal(err)
	}
	r.until("moved/deep/b.yaml=bb")
	if err := os.RemoveAll(dir + "/moved"); err != nil {
		t.Fatal(err)
	}
	r.until()
}

func TestWhatIsNoConfigurationChangesNothing(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a.yaml", "1")
	r := run(t, dir, source.Options{})
	first := r.until("a.yaml=1")
	write(t, dir+"/.a.yaml.swp", "x")
	write(t, dir+"/4913", "x")
	write(t, dir+"/a.yaml~", "x")
	write(t, dir+"/a.yaml", "1") // the same again
	rename(t, dir+"/b.yaml", "2")
	select {
	case rev := <-r.revisions:
		if got := names(rev); !slices.Equal(got, []string{"a.yaml=1", "b.yaml=2"}) || rev.ID == first.ID {
			t.Errorf("the second revision holds %q", got)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("no second revision")
	}
}

// TestConfigMap changes a directory as the kubelet does: one symbolic link is replaced, and every
// file changes at once.
func TestConfigMap(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/..1/a.yaml", "1")
	write(t, dir+"/..1/b.yaml", "1")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Symlink("..1", dir+"/..data"))
	must(os.Symlink("..data/a.yaml", dir+"/a.yaml"))
	must(os.Symlink("..data/b.yaml", dir+"/b.yaml"))
	r := run(t, dir, source.Options{})
	r.until("a.yaml=1", "b.yaml=1")
	write(t, dir+"/..2/a.yaml", "2")
	write(t, dir+"/..2/b.yaml", "2")
	must(os.Symlink("..2", dir+"/..data_tmp"))
	must(os.Rename(dir+"/..data_tmp", dir+"/..data"))
	must(os.RemoveAll(dir + "/..1"))
	select {
	case rev := <-r.revisions:
		if got := names(rev); !slices.Equal(got, []string{"a.yaml=2", "b.yaml=2"}) {
			t.Errorf("the next revision is %q, want both files of the new one", got)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the replaced link was not seen")
	}
}

func TestDirectoryThatVanishesKeepsTheLastRevision(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	write(t, dir+"/a.yaml", "1")
	r := run(t, dir, source.Options{Rescan: 20 * time.Millisecond})
	r.until("a.yaml=1")
	if err := os.Rename(dir, dir+"-away"); err != nil {
		t.Fatal(err)
	}
	if err := r.problem(); err == nil || !strings.Contains(err.Error(), dir) {
		t.Fatalf("problem %v, want one that names %s", err, dir)
	}
	write(t, dir+"-new/a.yaml", "2")
	if err := os.Rename(dir+"-new", dir); err != nil {
		t.Fatal(err)
	}
	if err := r.problem(); err != nil {
		t.Fatalf("problem %v, want its end", err)
	}
	r.until("a.yaml=2")
	rename(t, dir+"/a.yaml", "3")
	r.until("a.yaml=3")
}

func TestUnreadableSetKeepsTheLastRevision(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a.yaml", "1")
	r := run(t, dir, source.Options{Limits: source.Limits{FileBytes: 4}})
	r.until("a.yaml=1")
	rename(t, dir+"/b.yaml", "too long")
	if err := r.problem(); err == nil || !strings.Contains(err.Error(), "b.yaml") {
		t.Fatalf("problem %v, want one that names b.yaml", err)
	}
	if len(r.revisions) != 0 {
		t.Errorf("a revision was handed out: %q", names(<-r.revisions))
	}
	rename(t, dir+"/b.yaml", "2")
	if err := r.problem(); err != nil {
		t.Fatalf("problem %v, want its end", err)
	}
	r.until("a.yaml=1", "b.yaml=2")
}

func TestRescanFindsWhatNobodyToldOf(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(t.TempDir(), "a.yaml")
	write(t, target, "1")
	// A link to a link: only the directory of the last one is watched.
	middle := filepath.Join(t.TempDir(), "m")
	if err := os.Symlink(target, middle); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(middle, dir+"/a.yaml"); err != nil {
		t.Fatal(err)
	}
	r := run(t, dir, source.Options{Rescan: 20 * time.Millisecond})
	r.until("a.yaml=1")
	other := filepath.Join(t.TempDir(), "b.yaml")
	write(t, other, "2")
	if err := os.Symlink(other, middle+"2"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(middle+"2", middle); err != nil {
		t.Fatal(err)
	}
	r.until("a.yaml=2")
}

func TestNewDirSaysWhatIsWrong(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	write(t, file, "")
	for path, want := range map[string]string{
		file:        "is a file",
		file + "-x": "no such file or directory; create it",
	} {
		if _, err := source.NewDir(path, source.Options{}); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("NewDir(%q) = %v, want an error with the path and %q", path, err, want)
		}
	}
}
