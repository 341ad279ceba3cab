package node

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

func openDir(path string) (*os.File, error) { return os.Open(path) }

// register opens a registration at a node as this process and gives the node's first answer.
func register(t *testing.T, socket string, start *nodepb.Start) (*nodepb.Started, error) {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///node", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	stream, err := nodepb.NewNodeClient(cc).Run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&nodepb.RunRequest{Kind: &nodepb.RunRequest_Start{Start: start}}); err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	return resp.GetStarted(), err
}

// refuseRegistrations: who names another's cgroup, one outside of the managed root, or a service that
// is not its user's is refused, and the log says so.
func refuseRegistrations(t *testing.T, n *oneNode) {
	socket := filepath.Join(n.run, "node.sock")
	victim := n.client("go", program{service: "another"})
	answers(t, victim, []any{"tcp", "4", n.vip["open"].v4, 80}, "open")
	leaves, err := filepath.Glob(filepath.Join(n.cgroup.root, "another.default-*"))
	if err != nil || len(leaves) == 0 {
		t.Fatalf("cgroups of the victim: %v, %v", leaves, err)
	}
	outside := filepath.Join(n.cgroup.parent, "outside")
	if err := os.Mkdir(outside, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(outside)
	for name, tc := range map[string]struct {
		service string
		managed *nodepb.Managed
		want    string // of the status
		audit   []string
	}{
		"another's cgroup":                {"spoofer", &nodepb.Managed{Cgroup: leaves[0]}, "another's", []string{leaves[0]}},
		"a cgroup outside":                {"spoofer", &nodepb.Managed{Cgroup: outside}, "outside the managed root", []string{outside}},
		"a cgroup below a leaf":           {"spoofer", &nodepb.Managed{Cgroup: leaves[0] + "/inner"}, "outside the managed root", nil},
		"the managed root itself":         {"spoofer", &nodepb.Managed{Cgroup: n.cgroup.root}, "outside the managed root", nil},
		"a path that climbs":              {"spoofer", &nodepb.Managed{Cgroup: n.cgroup.root + "/../outside"}, "outside the managed root", nil},
		"one that nobody was given":       {"spoofer", &nodepb.Managed{Cgroup: filepath.Join(n.cgroup.root, "spoofer.default-x")}, "unknown", nil},
		"a service that is not the users": {"spoofer", &nodepb.Managed{Uid: 65534}, "65534", []string{"uid=65534"}},
		"the mesh's own namespace":        {"spoofer.inlay", &nodepb.Managed{}, "inlay", nil},
		"a name that is none":             {"Spoofer", &nodepb.Managed{}, "Spoofer", nil},
	} {
		t.Run(name, func(t *testing.T) {
			service, namespace, dotted := strings.Cut(tc.service, ".")
			if !dotted {
				namespace = "default"
			}
			started, err := register(t, socket, &nodepb.Start{Namespace: namespace, Service: service, RunId: "bad-" + random(), Managed: tc.managed})
			s := status.Convert(err)
			if err == nil || s.Code() != codes.PermissionDenied && s.Code() != codes.InvalidArgument || !strings.Contains(s.Message(), tc.want) {
				t.Errorf("%v, %v: want it refused with %q", started, err, tc.want)
			}
			if tc.audit != nil {
				n.dev.said(append(tc.audit, "level=WARN", "registration refused")...)
			}
		})
	}
	if a := victim.ask("tcp", "4", n.vip["open"].v4, 80); a.failed() != "" {
		t.Errorf("the victim after that: %+v", a)
	}

	// The same by the command, as somebody would meet it.
	_, stderr, code := run(t, exec.Command(n.bin.inlay, "run", "--run-dir", n.run, "--ebpf", "--user", "65534", "--service", "spoofer", "--", "true"))
	if code != 1 || !strings.Contains(stderr, "the node refused service") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("run --user 65534: exit code %d: %s", code, stderr)
	}
	// Somebody who is not root asks for a cgroup.
	cmd := exec.Command(publicSelf(t, n.dir))
	cmd.Env = append(os.Environ(), "NODE_ROLE=register", "NODE_SOCKET="+socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "root") {
		t.Errorf("a registration by user 65534: %v, %s", err, out)
	}
	// Another agent for the same cgroup.
	_, stderr, code = run(t, n.home.command(n.bin.inlay, "node", "--ebpf", "--cgroup", n.cgroup.name, "--run-dir", filepath.Join(n.dir, "second"),
		"--control-plane", filepath.Join(n.run, "controlplane.sock"), "--metrics-addr", "off"))
	if code != 6 {
		t.Errorf("a second agent for one cgroup: exit code %d: %s", code, stderr)
	}
}

// publicSelf is this test binary where everybody may run it.
func publicSelf(t *testing.T, dir string) string {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "public-"+random())
	if err := os.WriteFile(path, raw, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// registerRole asks the node at NODE_SOCKET for a managed registration and fails as it is refused.
func registerRole() error {
	cc, err := grpc.NewClient("unix:"+os.Getenv("NODE_SOCKET"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	stream, err := nodepb.NewNodeClient(cc).Run(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&nodepb.RunRequest{Kind: &nodepb.RunRequest_Start{Start: &nodepb.Start{
		Namespace: "default", Service: "spoofer", RunId: "bad-" + random(), Managed: &nodepb.Managed{},
	}}})
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

// TestUnsupported: one clear line and exit code 3 where there can be no programs; nothing is made.
func TestUnsupported(t *testing.T) {
	need(t)
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	dev := []string{
		"dev", "--ebpf", "--config", dir, "--data", dir, "--run-dir", dir, "--xds-addr=", "--xds-mtls-addr=",
		"--admin-addr", "127.0.0.1:0", "--metrics-addr", "off",
	}
	if err := os.Chmod(b.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		as, hide string // the user, and what the machine has not
		args     []string
		want     string
	}{
		"run as nobody":                  {"nobody", "", []string{"run", "--ebpf", "--service", "a", "--", "true"}, "run: sudo " + b.inlay + " run --ebpf --service a -- true"},
		"dev as nobody":                  {"nobody", "", []string{"dev", "--ebpf", "--config", "/"}, "run: sudo "},
		"node as nobody":                 {"nobody", "", []string{"node", "--ebpf", "--run-dir", dir}, "eBPF is not available"},
		"probe as nobody":                {"nobody", "", []string{"node", "probe"}, "eBPF is not available"},
		"node without a cgroup2 mount":   {"root", "cgroup2", []string{"node", "--ebpf", "--run-dir", dir}, "cgroup2"},
		"dev without a cgroup2 mount":    {"root", "cgroup2", dev, "cgroup2"},
		"probe without a cgroup2 mount":  {"root", "cgroup2", []string{"node", "probe"}, "cgroup2"},
		"node without BTF of the kernel": {"root", "btf", []string{"node", "--ebpf", "--run-dir", dir}, "BTF"},
		"dev without BTF of the kernel":  {"root", "btf", dev, "BTF"},
		"node in a cgroup that is none":  {"root", "", []string{"node", "--ebpf", "--run-dir", dir, "--cgroup", dir}, "cgroup2"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(b.inlay, tc.args...)
			cmd.Env = append(os.Environ(), "HOME=/")
			if tc.as == "nobody" {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			}
			if tc.hide != "" {
				cmd.Path, cmd.Args = self(t), append([]string{"hide", b.inlay}, tc.args...)
				cmd.Env = append(cmd.Env, "NODE_ROLE=hide", "NODE_HIDE="+tc.hide)
			}
			stdout, stderr, code := run(t, cmd)
			if code != 3 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, tc.want) {
				t.Errorf("exit code %d: %s%s; want 3 and one line with %q", code, stdout, stderr, tc.want)
			}
		})
	}
}

// underHidden runs a program on a machine that lacks something, as far as it can see: in a mount
// namespace of its own. Only the mount is gone; the kernel is the same.
func underHidden() error {
	if err := ownMounts(); err != nil {
		return err
	}
	switch os.Getenv("NODE_HIDE") {
	case "cgroup2":
		for { // every mount of it
			path, err := load.FindCgroup2()
			if err != nil {
				break
			}
			if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("umount %s: %w", path, err)
			}
		}
	case "btf":
		if err := unix.Mount("/dev/null", "/sys/kernel/btf/vmlinux", "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount --bind: %w", err)
		}
	}
	return syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
}
