package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/proxy"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// needs skips a test that this machine or user cannot run, loudly; in CI, which can, it fails.
func needs(t *testing.T, ok bool, why string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func TestReadSockets(t *testing.T) {
	// A little-endian machine's tables; of a big-endian one each word has its bytes the other way round.
	const tcp = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0000000000000000 100 0 0 10 0
   1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1 0000000000000000 100 0 0 10 0
   2: 0100007F:1F90 0100007F:A0A0 01 00000000:00000000 00:00000000 00000000  1000        0 4713 1 0000000000000000 20 4 30 10 -1
   3: 0100007F:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4714 1 0000000000000000 100 0 0 10 0
`
	const tcp6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4715 1 0000000000000000 100 0 0 10 0
   1: 0000000000000000FFFF00000100007F:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4716 1 0000000000000000 100 0 0 10 0
`
	for name, tc := range map[string]struct {
		text  string
		state uint64
		port  uint16
		want  string
	}{
		"those that listen on the port":      {tcp, stateListen, 8080, "127.0.0.1:8080=4711 0.0.0.0:8080=4712"},
		"not those of another port":          {tcp, stateListen, 8081, "127.0.0.1:8081=4714"},
		"none in another state":              {tcp, stateClose, 8080, ""},
		"IPv6, mapped ones as what they are": {tcp6, stateListen, 8080, "[::1]:8080=4715 127.0.0.1:8080=4716"},
		"an empty table":                     {"", stateListen, 8080, ""},
		"lines that are none":                {"a b c d e f g h i j k\n0: zz:1F90 x 0A a b c d e 1\n0: 0100007F x 0A a b c d e 1\n", stateListen, 8080, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := readSockets(strings.NewReader(tc.text), tc.state, tc.port)
			if err != nil {
				t.Fatal(err)
			}
			var text []string
			for _, b := range got {
				text = append(text, fmt.Sprintf("%s=%d", b.addr, b.inode))
			}
			if s := strings.Join(text, " "); s != tc.want {
				t.Errorf("got %q, want %q", s, tc.want)
			}
		})
	}
}

// cgroup makes a cgroup below the cgroup2 mount for one test.
func cgroup(t *testing.T) string {
	t.Helper()
	needs(t, os.Geteuid() == 0, "cgroups are root's to make")
	mnt, err := load.FindCgroup2()
	needs(t, err == nil, "no cgroup2")
	dir, err := os.MkdirTemp(mnt, "inlay-test-")
	needs(t, err == nil, fmt.Sprintf("cgroup2 cannot be written: %v", err))
	t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) // what a failed test left
		deadline := time.Now().Add(5 * time.Second)
		for {
			_, left, err := removeCgroups(dir)
			if err == nil && len(left) == 0 {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("cgroups %v are left: %v", left, err)
				return
			}
		}
	})
	return dir
}

// startIn starts a program as `inlay run --ebpf` does, with its output in a file.
func startIn(t *testing.T, dir string, a account, args ...string) (*os.Process, func() string) {
	t.Helper()
	return startManaged(t, dir, &managedRun{account: a}, args...)
}

func startManaged(t *testing.T, dir string, m *managedRun, args ...string) (*os.Process, func() string) {
	t.Helper()
	out, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	stdout := os.Stdout
	os.Stdout = out
	defer func() { os.Stdout = stdout }()
	reg := registration{namespace: "default", service: "cart", runID: "1", managed: m}
	p, err := startProgram(args[0], args, reg, &nodepb.Started{WorkloadSocket: "/w", ControlPlane: "unix:/c", Cgroup: dir})
	if err != nil {
		t.Fatal(err)
	}
	return p, func() string {
		raw, err := os.ReadFile(out.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
}

// A managed program is in its cgroup from its first instruction on, and is its user, with its groups
// and home, and with nothing of root's.
func TestManagedProgramIsStartedInside(t *testing.T) {
	dir := cgroup(t)
	a := account{uid: 65534, gid: 65533, groups: []uint32{7, 4711}, name: "ghost", home: "/nowhere", shell: "/bin/ghost"}
	t.Setenv("SUDO_UID", "1000")
	t.Setenv("HOME", "/root")
	t.Setenv("SUDO_ASKPASS", "/root/askpass")
	// A socket that whoever called `inlay run` left open, and capabilities that files could pick up.
	open, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(open)
	runtime.LockOSThread() // ends with the goroutine: the thread is not given back
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	data[0].Inheritable = data[0].Permitted
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	p, output := startIn(t, dir, a, "/bin/sh", "-c", "cat /proc/self/cgroup /proc/self/status; env; ls -l /proc/self/fd")
	if st, err := p.Wait(); err != nil || !st.Success() {
		t.Fatalf("%v, %v", st, err)
	}
	out := output()
	for _, want := range []string{
		"/" + filepath.Base(dir) + "\n", "Uid:\t65534\t65534\t65534\t65534\n", "Gid:\t65533\t65533\t65533\t65533\n", "Groups:\t7 4711 \n",
		"CapInh:\t0000000000000000\n", "CapPrm:\t0000000000000000\n", "CapEff:\t0000000000000000\n", "CapAmb:\t0000000000000000\n", "HOME=/nowhere\n", "USER=ghost\n", "LOGNAME=ghost\n", "SHELL=/bin/ghost\n", "INLAY_SERVICE=cart\n",
		"SPIFFE_ENDPOINT_SOCKET=unix:///w\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "SUDO_") {
		t.Errorf("the caller of sudo shows in\n%s", out)
	}
	if strings.Contains(out, "socket:[") {
		t.Errorf("a socket of outside the cgroup came along in\n%s", out)
	}
}

// A program of root's comes to no packet socket either, unless it was granted raw ones; nothing else is
// taken from it, and nothing from whoever starts it.
func TestManagedProgramWithoutRawSockets(t *testing.T) {
	dir := cgroup(t)
	sets := func(raw bool) map[string]uint64 {
		t.Helper()
		a := account{uid: 0, gid: 0, home: "/", shell: "/bin/sh"}
		p, output := startManaged(t, dir, &managedRun{account: a, raw: raw}, "/bin/cat", "/proc/self/status")
		if st, err := p.Wait(); err != nil || !st.Success() {
			t.Fatalf("%v, %v", st, err)
		}
		out := map[string]uint64{}
		for line := range strings.Lines(output()) {
			name, value, ok := strings.Cut(strings.TrimSpace(line), ":\t")
			if !ok || !strings.HasPrefix(name, "Cap") {
				continue
			}
			set, err := strconv.ParseUint(value, 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			out[name] = set
		}
		return out
	}
	const raw = uint64(1) << unix.CAP_NET_RAW
	granted, plain := sets(true), sets(false)
	needs(t, granted["CapBnd"]&raw != 0, "these tests run without CAP_NET_RAW")
	for _, name := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if plain[name] != granted[name]&^raw {
			t.Errorf("%s: %x, with raw sockets %x; want CAP_NET_RAW gone and nothing else", name, plain[name], granted[name])
		}
	}
	if again := sets(true); again["CapEff"] != granted["CapEff"] {
		t.Errorf("capabilities of the next program: %x, want %x", again["CapEff"], granted["CapEff"])
	}
}

// Where the program listens is read from the kernel, for its own sockets only.
func TestListeningAtWithoutACall(t *testing.T) {
	python, err := exec.LookPath("/usr/bin/python3")
	needs(t, err == nil, "no /usr/bin/python3")
	dir := cgroup(t)
	// Somebody else listens on the port too, at another address.
	other, err := net.Listen("tcp4", "127.0.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	port := other.Addr().(*net.TCPAddr).AddrPort().Port()
	const script = `import socket, sys
kind = socket.SOCK_DGRAM if sys.argv[1] == "udp" else socket.SOCK_STREAM
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET, kind)
s.bind((sys.argv[2], int(sys.argv[3])))
if kind == socket.SOCK_STREAM: s.listen()
sys.stdin.read()`
	for name, tc := range map[string]struct{ kind, bind, want string }{
		"one address":              {"tcp", "127.0.0.1", "127.0.0.1"},
		"an address of IPv6":       {"tcp", "::1", "::1"},
		"datagrams at one address": {"udp", "127.0.0.1", "127.0.0.1"},
		"datagrams at any address": {"udp", "0.0.0.0", "0.0.0.0"},
	} {
		t.Run(name, func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			stdin := os.Stdin
			os.Stdin = r
			p, _ := startIn(t, dir, account{uid: 65534, gid: 65534, home: "/", shell: "/bin/sh"}, python, "-c", script, tc.kind, tc.bind, strconv.Itoa(int(port)))
			os.Stdin = stdin
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			prog := program{p.Pid, dir}
			addr, ok := prog.awaitListening(ctx, port, tc.kind == "udp")
			if want := netip.AddrPortFrom(netip.MustParseAddr(tc.want), port); !ok || addr != want {
				t.Errorf("listens at %s, %v; want %s", addr, ok, want)
			}
			if tc.kind == "udp" {
				if _, ok, err := prog.listeningAt(port, false); ok || err != nil {
					t.Errorf("a socket of another process was taken for the program's: %v", err)
				}
			}
			w.Close()
			if _, err := p.Wait(); err != nil {
				t.Fatal(err)
			}
			if _, ok, err := prog.listeningAt(port, tc.kind == "udp"); ok || err != nil {
				t.Errorf("after its end: %v, %v", ok, err)
			}
		})
	}
}

// Cgroups are removed from the deepest up; one with a process stays, and is named.
func TestRemoveCgroups(t *testing.T) {
	dir := cgroup(t)
	for _, name := range []string{"a", "a/b", "c"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	fd, err := os.Open(filepath.Join(dir, "c"))
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	cmd := exec.Command("/bin/cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(fd.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pids, err := cgroupProcesses(dir)
	if err != nil || !slices.Equal(pids, []int{cmd.Process.Pid}) {
		t.Errorf("processes %v, %v; want %d", pids, err, cmd.Process.Pid)
	}
	gone, left, err := removeCgroups(dir)
	if err != nil || !slices.Equal(gone, []string{dir + "/a/b", dir + "/a"}) || !slices.Equal(left, []string{dir + "/c"}) {
		t.Errorf("removed %v, left %v, %v", gone, left, err)
	}
	stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	gone, left, err = removeCgroups(dir)
	if err != nil || !slices.Equal(gone, []string{dir + "/c", dir}) || len(left) > 0 {
		t.Errorf("removed %v, left %v, %v", gone, left, err)
	}
	if gone, left, err = removeCgroups(dir); err != nil || len(gone)+len(left) > 0 {
		t.Errorf("a second time: removed %v, left %v, %v", gone, left, err)
	}
}

func TestProgramAccount(t *testing.T) {
	none := func(string) string { return "" }
	sudo := func(vars ...string) func(string) string {
		return func(k string) string { return lookup(vars, k) }
	}
	root, err := programAccount("root", none)
	if err != nil || root.uid != 0 || root.name != "root" || root.home == "" || root.shell == "" {
		t.Errorf("root by its name: %+v, %v", root, err)
	}
	for name, tc := range map[string]struct {
		flag string
		env  func(string) string
		uid  uint32
		gid  uint32
		want string // of the error
	}{
		"root is not taken unless named":          {"", none, 0, 0, "--user root"},
		"nor when root called sudo":               {"", sudo("SUDO_UID=0", "SUDO_GID=0"), 0, 0, "--user root"},
		"who called sudo":                         {"", sudo("SUDO_UID=4000000001", "SUDO_GID=4000000002"), 4000000001, 4000000002, ""},
		"a number without an account owns little": {"4000000001", none, 4000000001, noGroup, ""},
		"a name that is none":                     {"no-such-user", none, 0, 0, "no such user"},
		"a number that means unchanged":           {"4294967295", none, 0, 0, "no such user"},
		"a negative number":                       {"-1", none, 0, 0, "no such user"},
	} {
		t.Run(name, func(t *testing.T) {
			a, err := programAccount(tc.flag, tc.env)
			if tc.want != "" {
				var coded *exitError
				if err == nil || !strings.Contains(err.Error(), tc.want) || !errors.As(err, &coded) || coded.code != exitUsage {
					t.Errorf("error %v, want a usage error that says %q", err, tc.want)
				}
				return
			}
			if err != nil || a.uid != tc.uid || a.gid != tc.gid {
				t.Errorf("%+v, %v", a, err)
			}
		})
	}
}

func TestLoginShell(t *testing.T) {
	path := filepath.Join(t.TempDir(), "passwd")
	const text = "root:x:0:0:root:/root:/bin/bash\nshort:x:1\nempty:x:2:2::/:\nada:x:1000:1000:Ada,,,:/home/ada:/usr/bin/fish\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"root": "/bin/bash", "ada": "/usr/bin/fish", "empty": "/bin/sh", "short": "/bin/sh", "nobody": "/bin/sh"} {
		if got := loginShell(path, name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if got := loginShell(path+".none", "root"); got != "/bin/sh" {
		t.Errorf("without the file: %q", got)
	}
}

func TestAccountEnvironment(t *testing.T) {
	base := []string{"HOME=/root", "PATH=/bin", "SUDO_COMMAND=x", "SUDO_UID=1000", "XDG_DATA_HOME=/root/.local/share", "XDG_RUNTIME_DIR=/run/user/0"}
	before := slices.Clone(base)
	got := account{uid: 4000000001, name: "ada", home: "/home/ada", shell: "/bin/fish"}.environment(base)
	if want := []string{"HOME=/home/ada", "LOGNAME=ada", "PATH=/bin", "SHELL=/bin/fish", "USER=ada"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	got = account{uid: 4000000001, home: "/", shell: "/bin/sh"}.environment(base)
	if lookup(got, "USER") != "4000000001" {
		t.Errorf("%v, want the number for a name", got)
	}
	got = account{name: "root", home: "/root", shell: "/bin/bash"}.environment(base)
	if lookup(got, "XDG_RUNTIME_DIR") != "/run/user/0" || lookup(got, "SUDO_UID") != "" {
		t.Errorf("root keeps its directories: %v", got)
	}
	if !slices.Equal(base, before) {
		t.Error("the process's own environment was changed")
	}
}

func TestShellWord(t *testing.T) {
	for in, want := range map[string]string{"": "''", "run": "run", "--port=80:8080/udp": "--port=80:8080/udp", "a b": "'a b'", "it's": `'it'\''s'`, "$HOME": "'$HOME'", "~": "'~'", "ä": "'ä'", "a;b": "'a;b'"} {
		if got := shellWord(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
		out, err := exec.Command("/bin/sh", "-c", "printf %s "+shellWord(in)).Output()
		if err != nil || string(out) != in {
			t.Errorf("%q: the shell reads %q, %v", in, out, err)
		}
	}
}

// Whoever is not root is told the line that does it, and code 3.
func TestNeedRoot(t *testing.T) {
	line := sudoLine([]string{"inlay", "run", "--ebpf", "--service", "cart", "--", "echo", "a b"})
	if !strings.HasPrefix(line, "sudo /") || !strings.HasSuffix(line, " run --ebpf --service cart -- echo 'a b'") {
		t.Errorf("line %q", line)
	}
	err := needRoot("why")
	var coded *exitError
	if os.Geteuid() != 0 && (!errors.As(err, &coded) || coded.code != exitUnsupported || !strings.Contains(err.Error(), "sudo ")) {
		t.Errorf("error %v, want code %d and the line", err, exitUnsupported)
	}
	if os.Geteuid() == 0 && err != nil {
		t.Errorf("root: %v", err)
	}
}

// TestUnprivileged runs the verbs that need root as nobody.
func TestUnprivileged(t *testing.T) {
	needs(t, os.Geteuid() == 0, "becoming another user needs root")
	dir := t.TempDir()
	bin := filepath.Join(os.TempDir(), fmt.Sprintf("inlay-test-%d", os.Getpid()))
	raw, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bin, raw, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(bin) })
	for _, tc := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"run", "--ebpf", "--service", "cart", "--", "true"}, exitUnsupported, "run: sudo " + bin + " run --ebpf --service cart -- true"},
		{[]string{"dev", "--ebpf", "--config", dir}, exitUnsupported, "run: sudo "},
		{[]string{"demo-legacy"}, exitUnsupported, "run: sudo "},
		{[]string{"node", "probe"}, exitUnsupported, "eBPF is not available: missing "},
		{[]string{"node", "--ebpf", "--run-dir", dir}, exitUnsupported, "eBPF is not available: missing "},
		{[]string{"node", "cleanup"}, exitUnsupported, "run: sudo "},
		{[]string{"node", "breakglass", "on"}, exitUnsupported, "run: sudo "},
	} {
		cmd := exec.Command(bin, tc.args...)
		cmd.Env = append(os.Environ(), verbVariable+"=1", "HOME=/", "XDG_RUNTIME_DIR=")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != tc.code || !strings.Contains(string(out), tc.want) || strings.Count(string(out), "\n") != 1 {
			t.Errorf("%v: %v, %q; want code %d and one line with %q", tc.args, err, out, tc.code, tc.want)
		}
	}
	// --allow-unmanaged: a node that says so in one line and works, for programs with the SDK.
	run := filepath.Join(os.TempDir(), fmt.Sprintf("inlay-test-run-%d", os.Getpid()))
	t.Cleanup(func() { _ = os.RemoveAll(run) })
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command(bin, "node", "--ebpf", "--allow-unmanaged", "--run-dir", run, "--ready-fd", "3")
	var text strings.Builder
	cmd.Stderr, cmd.ExtraFiles = &text, []*os.File{w}
	cmd.Env = append(os.Environ(), verbVariable+"=1", "HOME=/")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	line := make([]byte, 4096)
	n, err := r.Read(line)
	if err != nil || !strings.Contains(string(line[:n]), "workload.sock") {
		t.Errorf("ready: %q, %v", line[:n], err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("its end: %v", err)
	}
	if !strings.Contains(text.String(), "running on without programs (--allow-unmanaged)") || !strings.HasPrefix(text.String(), "inlay node: eBPF is not available") {
		t.Errorf("said %q", text.String())
	}
}

// verbVariable has this test binary be inlay.
const verbVariable = "INLAY_TEST_VERB"

func TestMain(m *testing.M) {
	if os.Getenv(verbVariable) != "" {
		main()
	}
	os.Exit(m.Run())
}

// Taking one agent away leaves the DNS proxy of another, which has the same run directory by default.
func TestCleanupStopsItsOwnProxyOnly(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "pins")
	for name, tc := range map[string]struct {
		flags pinFlags
		want  bool
	}{
		"the default agent, whose pins are gone already":       {pinFlags{}, true},
		"another cgroup, whose pins are gone":                  {pinFlags{cgroup: "inlay-test"}, false},
		"another cgroup, whose run directory the caller names": {pinFlags{cgroup: "inlay-test", runDir: "/run/other"}, true},
	} {
		if got := ownProxy(missing, tc.flags)(proxy.Status{MapID: 7}); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
	// With pins, the maps decide.
	dir := cgroup(t)
	pin := filepath.Join(load.BPFFS, "inlay-test-"+filepath.Base(dir))
	set, err := load.Open(load.Config{Cgroup: dir, Pin: pin}, nil)
	needs(t, err == nil, fmt.Sprintf("programs cannot be loaded: %v", err))
	defer func() {
		if _, err := load.Cleanup(pin); err != nil {
			t.Error(err)
		}
	}()
	id, err := proxy.MapID(set.Maps())
	if err := errors.Join(err, set.Close()); err != nil {
		t.Fatal(err)
	}
	mine := ownProxy(pin, pinFlags{})
	if !mine(proxy.Status{MapID: id}) || mine(proxy.Status{MapID: id + 1}) {
		t.Errorf("maps %d: want the proxy that uses them, and no other", id)
	}
}

func TestMapSizes(t *testing.T) {
	got, err := agentFlags{mapSizes: []string{"policies=2097152", "peers=10"}}.sizes()
	if err != nil || len(got) != 2 || got["policies"] != 2097152 || got["peers"] != 10 {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "policies", "=5", "policies=", "policies=0", "policies=-1", "policies=4294967296"} {
		var coded *exitError
		if _, err := (agentFlags{mapSizes: []string{bad}}).sizes(); !errors.As(err, &coded) || coded.code != exitUsage {
			t.Errorf("%q: %v, want a usage error", bad, err)
		}
	}
}
