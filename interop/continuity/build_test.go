package continuity

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/inlay-mesh/inlay/ebpf/load"
)

// The versions of the binary that these tests upgrade between. Each is built from the tree; those that
// differ in more than their name are built with an overlay (go help build, -overlay), so that the
// product needs no switch for it.
const (
	versionA       = "a"       // the one that everything starts with
	versionB       = "b"       // another version, same layout
	versionLayout  = "layout"  // another layout of the maps
	versionRefused = "refused" // one of its programs is refused by the verifier
)

// builder makes a directory of binaries; the first build error is everybody's.
type builder struct {
	once sync.Once
	dir  string
	err  error
	mu   sync.Mutex
	made map[string]func() (string, error)
}

var binaries builder

// inlay returns the path of a version of the binary, built at its first use.
func inlay(t *testing.T, version string) string {
	t.Helper()
	path, err := binaries.get(version)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func (b *builder) get(version string) (string, error) {
	b.once.Do(func() { b.dir, b.err = os.MkdirTemp("", "inlay-continuity-bin-") })
	if b.err != nil {
		return "", b.err
	}
	b.mu.Lock()
	if b.made == nil {
		b.made = map[string]func() (string, error){}
	}
	build := b.made[version]
	if build == nil {
		build = sync.OnceValues(func() (string, error) { return b.build(version) })
		b.made[version] = build
	}
	b.mu.Unlock()
	return build()
}

func removeBinaries() {
	if binaries.dir != "" {
		_ = os.RemoveAll(binaries.dir)
	}
}

func (b *builder) build(version string) (string, error) {
	bin := filepath.Join(b.dir, "inlay-"+version)
	args := []string{"build", raceFlag, "-ldflags", "-X main.version=continuity-" + version, "-o", bin}
	changed := map[string]string{}
	var err error
	switch version {
	case versionLayout:
		err = b.otherLayout(changed)
	case versionRefused:
		err = b.refusedProgram(changed)
	}
	if err != nil {
		return "", fmt.Errorf("version %q: %w", version, err)
	}
	if len(changed) > 0 {
		raw, err := json.Marshal(map[string]any{"Replace": changed})
		if err != nil {
			return "", err
		}
		overlay := bin + ".json"
		if err := os.WriteFile(overlay, raw, 0o600); err != nil {
			return "", err
		}
		args = append(args, "-overlay", overlay)
	}
	cmd := exec.Command("go", append(args, ".")...)
	cmd.Dir = filepath.Join("..", "..", "cmd", "inlay")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build of version %q: %w\n%s", version, err, text)
	}
	return bin, nil
}

// replace writes the other contents of a file of the tree, named from the root of the repository.
func (b *builder) replace(changed map[string]string, name string, contents []byte) error {
	at, err := filepath.Abs(filepath.Join("..", "..", filepath.FromSlash(name)))
	if err != nil {
		return err
	}
	file := filepath.Join(b.dir, strings.ReplaceAll(name, "/", "-"))
	changed[at] = file
	return os.WriteFile(file, contents, 0o600)
}

// otherLayout is a version whose maps are pinned under another layout.
func (b *builder) otherLayout(changed map[string]string) error {
	const name = "ebpf/load/maps.go"
	src, err := os.ReadFile(filepath.Join("..", "..", name))
	if err != nil {
		return err
	}
	line := regexp.MustCompile(`(?m)^const Layout = "` + load.Layout + `"$`)
	if n := len(line.FindAll(src, -1)); n != 1 {
		return fmt.Errorf("%s: %d lines like %s: want one", name, n, line)
	}
	return b.replace(changed, name, line.ReplaceAll(src, []byte(`const Layout = "`+load.Layout+`7"`)))
}

// otherLayoutDir is where that version pins.
const otherLayoutDir = "v" + load.Layout + "7"

// refusedProgram is a version with an object in which connect4 begins with an instruction that no
// verifier lets pass: r0 = *(u64 *)(r0 + 0), a read of a register that was never written.
func (b *builder) refusedProgram(changed map[string]string) error {
	const name, section, program = "ebpf/bpfobj/connect_bpfel.o", "cgroup/connect4", "connect4"
	object, err := os.ReadFile(filepath.Join("..", "..", name))
	if err != nil {
		return err
	}
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	defer f.Close()
	symbols, err := f.Symbols()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, s := range symbols {
		if s.Name != program || int(s.Section) >= len(f.Sections) || f.Sections[s.Section].Name != section {
			continue
		}
		at := f.Sections[s.Section].Offset + s.Value
		if at+8 > uint64(len(object)) {
			return fmt.Errorf("%s: symbol %s at %d: beyond its end", name, program, at)
		}
		const ldxdw = 0x79 // BPF_LDX | BPF_MEM | BPF_DW; dst and src are r0
		copy(object[at:], []byte{ldxdw, 0, 0, 0, 0, 0, 0, 0})
		return b.replace(changed, name, object)
	}
	return fmt.Errorf("%s: no symbol %s in section %s", name, program, section)
}
