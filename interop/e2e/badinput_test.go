package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// smallDisk mounts a file system of its own, of so many KiB.
func smallDisk(t *testing.T, kib int) string {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "mounting a small disk needs root")
	}
	dir, err := os.MkdirTemp("", "e2e-disk-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(dir) })
	if err := syscall.Mount("inlay-e2e", dir, "tmpfs", 0, fmt.Sprintf("size=%dk", kib)); err != nil {
		skip(t, fmt.Sprintf("mounting a small disk: %v", err))
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// fill writes a file until the disk is full.
func fill(t *testing.T, dir string) (file string) {
	t.Helper()
	file = filepath.Join(dir, "fill")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 4096); ; {
		if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
			return file
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

type statusOf struct {
	Pid      int
	Revision struct {
		ID               string
		Faults, Warnings []struct{ Code, Source, Message string }
	}
}

// newMeshAt is newMesh with its data in a directory of the test.
func newMeshAt(t *testing.T, data string, files map[string]string) *mesh {
	t.Helper()
	return newMesh(t, files, "--data", data) // the last of two flags counts
}

// padded is a configuration of some size, so that a full disk has no room for it.
func padded(n int) string {
	return greeterYAML(false)["mesh.yaml"] + strings.Repeat(fmt.Sprintf("# change %d %060d\n", n, n), 1500)
}

// TestFullDisk: the disk of the data directory fills up under load. Serving goes on, changes are
// live, status warns and names the remedy; so it does after the control plane was killed and started
// again on the full disk. With room again the warning goes.
func TestFullDisk(t *testing.T) {
	disk := smallDisk(t, 700)
	m := newMeshAt(t, filepath.Join(disk, "data"), greeterYAML(false))
	l := newLoad(m, 1)
	file := fill(t, disk)
	var s statusOf
	n := 0
	warned := func() bool {
		n++
		m.write("mesh.yaml", padded(n))
		s = statusOf{}
		m.jsonOf(&s, "status")
		for _, w := range s.Revision.Warnings {
			if w.Code == "STORE" && strings.Contains(w.Message, "is full") && strings.Contains(w.Message, "--data") {
				return true
			}
		}
		return false
	}
	m.eventually("a warning of the full disk", warned)
	newest := s.Revision.ID
	m.write("mesh.yaml", padded(-1))
	m.eventually("a change that is live on a full disk", func() bool {
		m.jsonOf(&s, "status")
		return s.Revision.ID != newest
	})

	if err := syscall.Kill(s.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m.dev.awaitStderr("controlplane is back")
	m.endpoints("greeter", 1)
	m.eventually("the warning after the restart", warned)

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	// Each kind of record is warned of until one of its kind is written again.
	m.program("shop", "", "go-spiffe").event("ready")
	m.eventually("no warning with room again", func() bool {
		n++
		m.write("mesh.yaml", greeterYAML(false)["mesh.yaml"]+fmt.Sprintf("# %d\n", n))
		s = statusOf{}
		m.jsonOf(&s, "status")
		return len(s.Revision.Warnings) == 0
	})
	l.end(true)
}

// TestReadOnlyDisk: `inlay dev` on a data directory that cannot be written says so once, with the
// remedy, and leaves what is there; made writable, it is the same mesh.
func TestReadOnlyDisk(t *testing.T) {
	disk := smallDisk(t, 4096)
	data := filepath.Join(disk, "data")
	first := newMeshAt(t, data, greeterYAML(false))
	first.dev.stop()
	before := hashTree(t, data)
	args := []string{"dev", "--config", first.config, "--data", data, "--run-dir", first.run,
		"--xds-addr", "127.0.0.1:0", "--xds-mtls-addr", "127.0.0.1:0", "--admin-addr", "127.0.0.1:0"}
	if err := syscall.Mount("inlay-e2e", disk, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, stderr, code := first.cli(args...)
	wantOneError(t, stderr, code, 1, "read-only file system", "make it writable", "--data DIR")
	if err := syscall.Mount("inlay-e2e", disk, "", syscall.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	if after := hashTree(t, data); after != before {
		t.Errorf("the refused start changed the data:\n%s\nwas\n%s", after, before)
	}
	again := first.start("dev again", nil, args...)
	again.line("Next: inlay run")
	if _, err := os.Stat(filepath.Join(data, "ca")); err != nil {
		t.Error(err)
	}
	again.stop()
}

// wantOneError checks what a verb said: one error, with these parts.
func wantOneError(t *testing.T, stderr string, code, wantCode int, parts ...string) {
	t.Helper()
	if code != wantCode {
		t.Errorf("exit code %d, want %d", code, wantCode)
	}
	if n := strings.Count(stderr, "inlay: "); n != 1 {
		t.Errorf("%d errors, want one clear one:\n%s", n, stderr)
	}
	for _, p := range parts {
		if strings.Count(stderr, p) != 1 {
			t.Errorf("want %q once in\n%s", p, stderr)
		}
	}
	if strings.Contains(stderr, "panic") || strings.Contains(stderr, "goroutine ") {
		t.Errorf("a panic:\n%s", stderr)
	}
}

// hashTree is the names, modes and bytes of a directory, but for the file that says who runs.
func hashTree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) == ".pid" {
			return err
		}
		raw, err := os.ReadFile(path)
		fmt.Fprintf(&b, "%s %v %x\n", strings.TrimPrefix(path, dir), d.Type(), raw)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestForeignCache: a stored configuration that is not this program's, in any way, is refused with
// the reason and the remedy, and stays as it is; the call works, since the control plane is there.
func TestForeignCache(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	m.program("greeter", "", "grpc-server")
	m.endpoints("greeter", 1)
	state := t.TempDir()
	file := filepath.Join(state, "xds.cache")
	m.program("web", "", "once", "E2E_CALL=grpc:greeter", "INLAY_STATE_DIR="+state).wait()
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	newer := bytes.Clone(good)
	binary.BigEndian.PutUint32(newer[8:], 1000) // after the magic's 8 bytes
	flipped := bytes.Clone(good)
	flipped[len(flipped)-3] ^= 0x40
	for _, tc := range []struct {
		name, service string
		bytes         []byte
		want          []string
	}{
		{"of another service", "shop", good, []string{"belongs to spiffe://inlay.local/ns/default/svc/web", "svc/shop", "remove the file, or give each service its own INLAY_STATE_DIR"}},
		{"of a newer format", "web", newer, []string{"format 1000 is newer", "remove the file"}},
		{"damaged", "web", flipped, []string{"damaged", "remove the file"}},
		{"cut short", "web", good[:len(good)/2], []string{"damaged", "remove the file"}},
		{"of another program", "web", []byte("#!/bin/sh\n"), []string{"not a configuration snapshot", "remove the file"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := os.WriteFile(file, tc.bytes, 0o600); err != nil {
				t.Fatal(err)
			}
			p := m.program(tc.service, "", "once", "E2E_CALL=grpc:greeter", "INLAY_STATE_DIR="+state)
			if got := p.event("ready").Text; got != "greeter" {
				t.Errorf("answered by %q", got)
			}
			p.wait()
			if p.err != nil {
				t.Errorf("exit: %v", p.err)
			}
			text := p.stderrText()
			for _, w := range tc.want {
				if !strings.Contains(text, w) {
					t.Errorf("want %q in\n%s", w, text)
				}
			}
			if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, tc.bytes) {
				t.Errorf("the refused file was touched (%v)", err)
			}
		})
	}
	t.Run("damaged, and no control plane", func(t *testing.T) {
		if err := os.WriteFile(file, flipped, 0o600); err != nil {
			t.Fatal(err)
		}
		pid := m.daemon("control plane")
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
		p := m.program("web", "", "once", "E2E_CALL=grpc:greeter", "E2E_WITHIN=2s", "INLAY_STATE_DIR="+state)
		if e := p.event("error"); !strings.Contains(e.Text, "no configuration") || !strings.Contains(e.Text, "inlay status") {
			t.Errorf("it says %q, want that there is no configuration, and the remedy", e.Text)
		}
		p.wait()
		if code := p.cmd.ProcessState.ExitCode(); code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
	})
}

// TestWrongBootstrap: each wrong one is refused at Open, with its place.
func TestWrongBootstrap(t *testing.T) {
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		env  string
		want []string
	}{
		"broken JSON":      {`GRPC_XDS_BOOTSTRAP_CONFIG={"xds_servers": [`, []string{"GRPC_XDS_BOOTSTRAP_CONFIG", "line 1", "unexpected end"}},
		"a wrong type":     {`GRPC_XDS_BOOTSTRAP_CONFIG={"xds_servers": "localhost:15010"}`, []string{"xds_servers: want a list"}},
		"a wrong node":     {`GRPC_XDS_BOOTSTRAP_CONFIG={"xds_servers": [{"server_uri": "127.0.0.1:1", "channel_creds": [{"type": "insecure"}]}], "node": {"id": 7}}`, []string{"node", "id: want a string"}},
		"credentials":      {`GRPC_XDS_BOOTSTRAP_CONFIG={"xds_servers": [{"server_uri": "127.0.0.1:1", "channel_creds": [{"type": "google_default"}]}]}`, []string{`"google_default" is supported`, "want insecure, inlay_svid, tls"}},
		"no server":        {`GRPC_XDS_BOOTSTRAP_CONFIG={}`, []string{"xds_servers is missing"}},
		"a missing file":   {"GRPC_XDS_BOOTSTRAP=" + filepath.Join(dir, "nope.json"), []string{"nope.json", "inlay bootstrap --service NAME -o"}},
		"a directory":      {"GRPC_XDS_BOOTSTRAP=" + dir, []string{dir, "is a directory"}},
		"a wrong address":  {"INLAY_ADDR=15010", []string{"INLAY_ADDR", "HOST:PORT"}},
		"a wrong snapshot": {"INLAY_CONFIG=" + testBinary(t), []string{"not a configuration snapshot", "inlay compile DIR --for SERVICE -o"}},
		"no snapshot":      {"INLAY_CONFIG=" + filepath.Join(dir, "nope"), []string{"nope", "inlay compile DIR --for SERVICE -o"}},
		"a wrong service":  {"INLAY_SERVICE=Web_1", []string{"INLAY_SERVICE", "want lower-case letters, digits and inner dashes"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := startProc(t, "once", exec.Command(testBinary(t)), []string{tc.env, "E2E_ROLE=once", "E2E_CALL=http:pages", "INLAY_STATE_DIR=" + t.TempDir()})
			e := c.event("error")
			for _, w := range tc.want {
				if !strings.Contains(e.Text, w) {
					t.Errorf("it says %q, want %q in it", e.Text, w)
				}
			}
			c.wait()
			if code := c.cmd.ProcessState.ExitCode(); code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			if text := c.stderrText(); strings.Contains(text, "panic") {
				t.Errorf("a panic:\n%s", text)
			}
		})
	}
}

// TestUnknownName: a call to a name that does not exist fails within a second, names the nearest that
// does, and leaves the program's other calls alone.
func TestUnknownName(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	m.program("greeter", "", "grpc-server")
	m.program("pages", "", "http-server")
	m.endpoints("greeter", 1)
	m.endpoints("pages", 1)
	for right, wrong := range map[string]string{"grpc:greeter": "grpc:greetr", "http:pages": "http:page"} {
		p := m.program("web", "", "misspell", "E2E_CALL="+right, "E2E_WRONG="+wrong, "INLAY_STATE_DIR="+t.TempDir())
		took := time.Duration(p.event("took").Nanos)
		t.Logf("%s: %v", wrong, took)
		if took > time.Second {
			t.Errorf("%s: the error came after %v, want within a second", wrong, took)
		}
		_, service, _ := cut(right)
		if e := p.event("error"); !strings.Contains(e.Text, "no service of that name exists") || !strings.Contains(e.Text, fmt.Sprintf("did you mean %q", service)) {
			t.Errorf("%s: %q, want that it does not exist, and the nearest", wrong, e.Text)
		}
		p.wait()
		if code := p.cmd.ProcessState.ExitCode(); code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
	}
	for _, at := range [][]string{{"--run-dir", m.run}, {"--config", m.config}} {
		_, stderr, code := m.cli(append([]string{"explain", "GET", "http://greetr/", "--from", "web"}, at...)...)
		wantOneError(t, stderr, code, 1, "no service of that name exists", `did you mean "greeter"?`)
	}
}

// TestDisabled: a disabled program finds a service where the variable says, without any mesh.
func TestDisabled(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("plain")) }))
	defer plain.Close()
	addr := plain.Listener.Addr().String()
	for name, tc := range map[string]struct{ env, want string }{
		"by its address":        {"INLAY_ADDR_PAGES=" + addr, "plain"},
		"that nobody serves":    {"INLAY_ADDR_PAGES=127.0.0.1:1", "connection refused"},
		"by a broken address":   {"INLAY_ADDR_PAGES=localhost", "INLAY_ADDR_PAGES: \"localhost\": want HOST:PORT"},
		"disabled by a mistake": {"INLAY_DISABLED=perhaps", "INLAY_DISABLED=\"perhaps\": want 1 or 0"},
	} {
		t.Run(name, func(t *testing.T) {
			c := startProc(t, "once", exec.Command(testBinary(t)), []string{"INLAY_DISABLED=1", tc.env, "E2E_ROLE=once", "E2E_CALL=http:pages", "INLAY_STATE_DIR=" + t.TempDir()})
			kind := "error"
			if tc.want == "plain" {
				kind = "ready"
			}
			if e := c.event(kind); !strings.Contains(e.Text, tc.want) {
				t.Errorf("it says %q, want %q in it", e.Text, tc.want)
			}
			c.wait()
			if code := c.cmd.ProcessState.ExitCode(); (code == 0) != (kind == "ready") {
				t.Errorf("exit code %d after %s", code, kind)
			}
		})
	}
}

// TestWithoutControlPlane: what the verbs do with files alone: validate, compile for a program that
// then runs from the file, explain from the directory, and a bootstrap on stdout.
func TestWithoutControlPlane(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("plain")) }))
	defer plain.Close()
	host, port, err := net.SplitHostPort(plain.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	m := offline(t)
	m.write("mesh.yaml", fmt.Sprintf(service, "pages", "HTTP", "permissive")+fmt.Sprintf("  endpoints: [{address: %s, port: %s}]\n", host, port))
	snapshot := filepath.Join(m.dir, "web.inlay")

	if stdout, stderr, code := m.cli("validate", m.config); code != 0 || stdout+stderr != "" {
		t.Errorf("validate: exit code %d: %s%s", code, stdout, stderr)
	}
	if stdout, stderr, code := m.cli("compile", m.config, "--for", "web", "-o", snapshot); code != 0 || !strings.Contains(stdout, "for web.default") {
		t.Errorf("compile: exit code %d: %s%s", code, stdout, stderr)
	}
	c := startProc(t, "once", exec.Command(testBinary(t)), []string{"INLAY_CONFIG=" + snapshot, "E2E_ROLE=once", "E2E_CALL=http:pages", "INLAY_STATE_DIR=" + t.TempDir()})
	if e := c.event("ready"); e.Text != "plain" {
		t.Errorf("answer %q", e.Text)
	}
	c.wait()
	stdout, stderr, code := m.cli("explain", "GET", "http://pages/", "--from", "web", "--config", m.config)
	if code != 0 || !strings.HasPrefix(stdout, "answered here, from "+m.config) || !strings.Contains(stdout, port) {
		t.Errorf("explain: exit code %d: %s%s", code, stdout, stderr)
	}
	stdout, stderr, code = m.cli("bootstrap", "--service", "web", "--server", "127.0.0.1:15010", "--node-id", "n1")
	if code != 0 || !strings.Contains(stdout, `"server_uri": "127.0.0.1:15010"`) || !strings.Contains(stdout, `"n1"`) {
		t.Errorf("bootstrap: exit code %d: %s%s", code, stdout, stderr)
	}

	m.write("broken.yaml", "apiVersion: inlay.dev/v1alpha1\nkind: MeshService\nmetadata: {name: a}\nspec:\n  ports: [{port: 99999, protocol: HTTP}]\n  mtsl: strict\n")
	m.write("worse.yaml", "kind: [\n")
	for _, args := range [][]string{
		{"validate", m.config},
		{"compile", m.config, "--for", "web", "-o", snapshot},
		{"explain", "GET", "http://pages/", "--from", "web", "--config", m.config},
	} {
		stdout, stderr, code := m.cli(args...)
		if code != 4 {
			t.Errorf("%s: exit code %d, want 4", args[0], code)
		}
		for _, want := range []string{"broken.yaml:5:", "broken.yaml:6:", "worse.yaml:", "3 faults"} {
			if !strings.Contains(stdout+stderr, want) {
				t.Errorf("%s: no %q in\n%s%s", args[0], want, stdout, stderr)
			}
		}
	}
	before, err := os.ReadFile(snapshot)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, code := m.cli("compile", m.config, "--for", "web", "-o", snapshot); code != 4 {
		t.Errorf("compile: exit code %d, want 4", code)
	}
	if after, err := os.ReadFile(snapshot); err != nil || !bytes.Equal(before, after) {
		t.Errorf("a refused compile touched the file (%v)", err)
	}
}

// offline is a mesh of which nothing runs: the binary and a directory of YAML.
func offline(t *testing.T) *mesh {
	t.Helper()
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	m := &mesh{t: t, bin: bin, dir: dir, config: filepath.Join(dir, "mesh"), run: filepath.Join(dir, "run")}
	if err := os.Mkdir(m.config, 0o755); err != nil {
		t.Fatal(err)
	}
	return m
}

// TestExplainWithoutClient: with no program of the caller alive its configuration is compiled, and the
// first line says so; with one alive that one answers.
func TestExplainWithoutClient(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	m.program("greeter", "", "grpc-server")
	m.endpoints("greeter", 1)
	args := []string{"explain", "POST", "http://greeter/inlay.examples.v1.Greeter/Hello", "--from", "web", "--run-dir", m.run}
	stdout, stderr, code := m.cli(args...)
	if code != 0 || !strings.HasPrefix(stdout, "answered here, since no program of web.default is alive: its configuration compiled (revision ") {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	address := m.listed("greeter")[0].Addresses[0]
	if !strings.Contains(stdout, address) {
		t.Errorf("no endpoint %s in\n%s", address, stdout)
	}
	caller := m.program("web", "", "caller", "E2E_CALL=grpc:greeter", "E2E_WORKERS=1")
	caller.event("ready")
	m.eventually("an answer of the live program", func() bool {
		stdout, stderr, code = m.cli(args...)
		return code == 0 && strings.HasPrefix(stdout, "answered by ")
	})
	if !strings.Contains(stdout, "a live program of web.default") || !strings.Contains(stdout, address) {
		t.Errorf("the live program says\n%s", stdout)
	}
}

// TestStableOutput: -o yaml prints the same bytes for the same state. (JSON is what it is made of.)
func TestStableOutput(t *testing.T) {
	files := stockMesh()
	files["static.yaml"] = fmt.Sprintf(service, "static", "HTTP", "permissive") +
		"  endpoints: [{address: 127.0.0.1, port: 1, labels: {d: x, a: x, c: x, b: x}}, {address: 127.0.0.1, port: 2, tls: mesh}]\n"
	m := newMesh(t, files)
	for _, verb := range [][]string{{"get", "services"}, {"get", "routes"}, {"get", "endpoints"}, {"status"}} {
		args := append(slices.Clone(verb), "-o", "yaml", "--run-dir", m.run)
		first, stderr, code := m.cli(args...)
		if code != 0 || first == "" {
			t.Errorf("%v: exit code %d: %s", args, code, stderr)
		}
		for range 2 {
			if again, _, _ := m.cli(args...); again != first {
				t.Errorf("%v: printed\n%s\nthen\n%s", args, first, again)
			}
		}
	}
}

// alive says whether a process runs; a zombie does not.
func alive(pid int) bool {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, rest, _ := bytes.Cut(raw, []byte(") "))
	return len(rest) > 0 && rest[0] != 'Z'
}

// TestDevKilled: killed with -9, dev takes its daemons along, and a new one starts in the same
// directories; what the old one had signed is still good.
func TestDevKilled(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	pids := []int{m.daemon("control plane"), m.daemon("node")}
	if err := m.dev.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	m.dev.wait()
	for _, pid := range pids {
		m.eventually(fmt.Sprintf("the end of process %d", pid), func() bool { return !alive(pid) })
	}
	again := m.start("dev again", nil, "dev", "--config", m.config, "--data", filepath.Join(m.dir, "data"), "--run-dir", m.run,
		"--xds-addr", "127.0.0.1:0", "--xds-mtls-addr", "127.0.0.1:0", "--admin-addr", "127.0.0.1:0")
	again.line("Next: inlay run")
	m.program("greeter", "", "grpc-server")
	m.endpoints("greeter", 1)
	if got := m.program("web", "", "once", "E2E_CALL=grpc:greeter").event("ready").Text; got != "greeter" {
		t.Errorf("answered by %q", got)
	}
}

// TestDevInterrupted: Ctrl-C ends dev and both daemons within 3 s, exit code 0, and leaves no socket.
func TestDevInterrupted(t *testing.T) {
	m := newMesh(t, greeterYAML(false))
	m.program("greeter", "", "grpc-server") // one that is connected, and goes on
	m.endpoints("greeter", 1)
	pids := []int{m.daemon("control plane"), m.daemon("node")}
	began := time.Now()
	if err := syscall.Kill(-m.dev.cmd.Process.Pid, syscall.SIGINT); err != nil { // the terminal's way: the group
		t.Fatal(err)
	}
	m.dev.wait()
	took := time.Since(began)
	t.Logf("ended after %v", took)
	if took > 3*time.Second {
		t.Errorf("it took %v, want at most 3 s", took)
	}
	if m.dev.err != nil {
		t.Errorf("dev: %v", m.dev.err)
	}
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("daemon %d still runs", pid)
		}
	}
	entries, err := os.ReadDir(m.run)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Type() == fs.ModeSocket || e.Name() == "controlplane.json" {
			t.Errorf("%s is left behind", e.Name())
		}
	}
}
