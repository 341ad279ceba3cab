package node

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// space is a network namespace of a test, which lives as long as the process that holds it.
type space struct {
	t    *testing.T
	path string
	pid  int
}

// newSpace makes one, and at the end of the test looks whether a process is left in it.
func newSpace(t *testing.T) *space {
	t.Helper()
	name := ""
	t.Cleanup(func() { // after everything that was started since
		nobodyLeft(t, func() []string { return processesIn(t, name) })
	})
	cmd := exec.Command(self(t))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	p := startProc(t, "namespace", cmd, "NODE_ROLE=space")
	s := &space{t: t, pid: cmd.Process.Pid, path: fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)}
	p.line("ready")
	var err error
	if name, err = os.Readlink(s.path); err != nil {
		t.Fatal(err)
	}
	s.ip("link set lo up")
	return s
}

// processesIn are the processes in a network namespace, by its name in /proc.
func processesIn(t *testing.T, name string) (out []string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range dirs {
		if got, err := os.Readlink(path); err == nil && got == name {
			out = append(out, path)
		}
	}
	return out
}

// command is a program that is to run inside.
func (s *space) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + s.path, "--"}, args...)...)
}

// ip runs ip(8) inside.
func (s *space) ip(args string) {
	s.t.Helper()
	if out, err := s.command(append([]string{"ip"}, strings.Fields(args)...)...).CombinedOutput(); err != nil {
		s.t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

// wire joins two namespaces by a veth pair, both ends called veth0.
func wire(a, b *space, addressesA, addressesB []string) {
	a.t.Helper()
	a.ip(fmt.Sprintf("link add veth0 type veth peer name veth0 netns %d", b.pid))
	for s, addresses := range map[*space][]string{a: addressesA, b: addressesB} {
		for _, address := range addresses {
			family := "-4"
			if strings.Contains(address, ":") {
				family, address = "-6", address+" nodad"
			}
			s.ip(family + " addr add " + address + " dev veth0")
		}
		s.ip("link set veth0 up")
	}
}

// sh runs a shell command inside.
func (s *space) sh(command string) {
	s.t.Helper()
	if out, err := s.command("sh", "-c", command).CombinedOutput(); err != nil {
		s.t.Fatalf("%s: %v: %s", command, err, out)
	}
}
