package proxy_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/proxy"
)

// Two further roles of this test binary: a proxy on pinned maps, and a program that asks.
const (
	pinnedVar = "INLAY_TEST_PINNED"
	askerVar  = "INLAY_TEST_ASKER"
)

type pinned struct {
	Pin, Socket, Version string
}

func bePinned(raw string) int {
	var c pinned
	if err := json.Unmarshal([]byte(raw), &c); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	maps, err := load.OpenMaps(c.Pin)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer maps.Close()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := proxy.Run(ctx, proxy.Config{Maps: maps, Socket: c.Socket, Version: c.Version}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// beAsker answers each line "KIND RESOLVER NAME" of its input by one line: what the resolver said.
// KIND is udp, tcp, or loose: a datagram from a socket that is not connected.
func beAsker() int {
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		f := strings.Fields(in.Text())
		q := question(f[2], dns.TypeA)
		r, err := func() (*dns.Msg, error) {
			timeout := 400 * time.Millisecond
			if f[0] != "loose" {
				r, _, err := (&dns.Client{Net: f[0], Timeout: timeout}).Exchange(q, f[1])
				return r, err
			}
			to, err := netip.ParseAddrPort(f[1])
			if err != nil {
				return nil, err
			}
			c, err := net.ListenUDP("udp", nil)
			if err != nil {
				return nil, err
			}
			defer c.Close()
			if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
				return nil, err
			}
			raw, err := q.Pack()
			if err != nil {
				return nil, err
			}
			if _, err := c.WriteToUDPAddrPort(raw, to); err != nil {
				return nil, err
			}
			buf := make([]byte, 4096)
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return nil, err
			}
			if from.Addr().Unmap() != to.Addr() || from.Port() != to.Port() {
				return nil, fmt.Errorf("the answer comes from %s", from)
			}
			r := new(dns.Msg)
			return r, r.Unpack(buf[:n])
		}()
		if err != nil {
			fmt.Println("error", err)
		} else {
			fmt.Println(got(r))
		}
	}
	return 0
}

// node is a managed cgroup with its programs attached, and one workload in it.
type node struct {
	pin, leaf string
	maps      *bpfobj.InlayMaps
}

// lacks skips a test for what this machine has not; in CI, which has it, that is a failure.
func lacks(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal("CI must run this: " + what)
	}
	t.Skip("SKIPPED, not tested here: " + what)
}

func newNode(t *testing.T) *node {
	t.Helper()
	if err := load.Check(); err != nil {
		lacks(t, err.Error())
	}
	mnt, err := load.FindCgroup2()
	if err != nil {
		t.Fatal(err)
	}
	if err := load.EnsureBPFFS(""); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("inlay-test-%08x", rand.Uint32())
	root := filepath.Join(mnt, name)
	n := &node{pin: filepath.Join(load.BPFFS, name), leaf: filepath.Join(root, "billing.shop-1")}
	t.Cleanup(func() {
		if _, err := load.Cleanup(n.pin); err != nil {
			t.Error(err)
		}
		for _, dir := range []string{n.leaf, root} {
			if err := os.Remove(dir); err != nil && !os.IsNotExist(err) {
				t.Error(err)
			}
		}
	})
	set, err := load.Open(load.Config{Cgroup: root, Pin: n.pin}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := set.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(n.leaf, 0o755); err != nil {
		t.Fatal(err)
	}
	n.maps = set.Maps()
	id, err := load.CgroupID(n.leaf)
	if err != nil {
		t.Fatal(err)
	}
	w := bpfobj.InlayWorkload{Identity: 4242}
	cString(w.Ns[:], "shop")
	cString(w.Service[:], "billing")
	if err := n.maps.Workloads.Put(&id, &w); err != nil {
		t.Fatal(err)
	}
	for name, addr := range map[string]string{"orders.shop": "198.18.0.2", "orders.default": "198.18.0.1"} {
		var k bpfobj.InlayNameKey
		cString(k.Text[:], name)
		v := bpfobj.InlayName{Addr4: bpfobj.InlayAddr{B: netip.MustParseAddr(addr).As16()}}
		if err := n.maps.Names.Put(&k, &v); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func cString(to []int8, s string) {
	for i := range len(s) {
		to[i] = int8(s[i])
	}
}

// inside starts a command in the workload's cgroup.
func (n *node) inside(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	dir, err := os.Open(n.leaf)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

// asker starts the program that asks, inside the workload's cgroup.
func (n *node) asker(t *testing.T) func(kind, resolver, name string) string {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), askerVar+"=1")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	n.inside(t, cmd)
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	lines := bufio.NewReader(out)
	return func(kind, resolver, name string) string {
		t.Helper()
		if _, err := fmt.Fprintln(in, kind, resolver, name); err != nil {
			t.Fatal(err)
		}
		s, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(s)
	}
}

// worldResolver answers on port 53 of a loopback address that no one else uses.
func worldResolver(t *testing.T) string {
	t.Helper()
	for range 16 {
		at := fmt.Sprintf("127.%d.%d.%d:53", 1+rand.IntN(250), rand.IntN(250), 1+rand.IntN(250))
		pc, err := net.ListenPacket("udp4", at)
		if err != nil {
			continue
		}
		l, err := net.Listen("tcp4", at)
		if err != nil {
			pc.Close()
			continue
		}
		serveDNS(t, pc, l, fixed("203.0.113.9"))
		return at
	}
	t.Fatal("no loopback address with a free port 53")
	return ""
}

// TestKernel: a program inside a managed cgroup, the real hooks, the real maps.
func TestKernel(t *testing.T) {
	n := newNode(t)
	world := worldResolver(t)
	asks := n.asker(t)
	if s := asks("udp", world, "orders."); s != "NOERROR 203.0.113.9" {
		t.Fatalf("without a proxy: %s, want the resolver's own word", s)
	}
	c := pinned{Pin: n.pin, Socket: socketPath(t), Version: "1"}
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	id, err := proxy.MapID(n.maps)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cfg := proxy.EnsureConfig{
		Command: []string{self}, Env: append(os.Environ(), pinnedVar+"="+string(raw)),
		Socket: c.Socket, Version: "1", MapID: id, Wait: 30 * time.Second,
	}
	stopAfter(t, c.Socket)
	pid, err := proxy.Ensure(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}

	unreachable6 := "[2001:db8::53]:53"
	for _, kind := range []string{"udp", "tcp", "loose"} {
		for _, resolver := range []string{world, "192.0.2.53:53", unreachable6} {
			for name, want := range map[string]string{
				"orders.": "NOERROR 198.18.0.2", "orders.default.": "NOERROR 198.18.0.1", "orders.default.mesh.": "NOERROR 198.18.0.1",
				"nobody.mesh.": "NXDOMAIN ns:SOA:mesh.",
			} {
				if s := asks(kind, resolver, name); s != want {
					t.Errorf("%s %s %s: %s, want %s", kind, resolver, name, s, want)
				}
			}
		}
		if s := asks(kind, world, "www.example."); s != "NOERROR 203.0.113.9" {
			t.Errorf("%s: a name of the world: %s, want the word of the resolver that was asked", kind, s)
		}
	}

	t.Run("the C library", func(t *testing.T) {
		getent, err := exec.LookPath("getent")
		if err != nil {
			lacks(t, "no getent")
		}
		cmd := exec.Command(getent, "ahostsv4", "orders.default.mesh")
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		n.inside(t, cmd)
		if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), "198.18.0.1") {
			t.Errorf("%s, %v: want 198.18.0.1", out.String(), err)
		}
	})

	t.Run("the entry is young and true", func(t *testing.T) {
		st, err := proxy.Ask(t.Context(), c.Socket)
		if err != nil {
			t.Fatal(err)
		}
		var e bpfobj.InlayDnsProxy
		if err := n.maps.DnsProxies.Lookup(&st.Netns, &e); err != nil {
			t.Fatal(err)
		}
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
			t.Fatal(err)
		}
		if age := time.Duration(now.Nano() - int64(e.Heartbeat)); age < 0 || age > time.Second {
			t.Errorf("heartbeat is %v old", age)
		}
		if netip.AddrFrom16(e.Addr4.B).Unmap() != st.Addresses[0].Addr() || st.MapID != id {
			t.Errorf("entry %+v, status %+v", e, st)
		}
	})

	t.Run("killed, names go to the resolver within two seconds", func(t *testing.T) {
		killed := time.Now()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for asks("udp", world, "www.example.") != "NOERROR 203.0.113.9" || asks("loose", world, "orders.") != "NOERROR 203.0.113.9" {
			if time.Since(killed) > 10*time.Second {
				t.Fatal("names do not resolve again")
			}
		}
		took := time.Since(killed)
		t.Logf("after %v", took)
		if took > 2*time.Second {
			t.Errorf("names resolved again after %v, want 2s at most", took)
		}
	})

	t.Run("started again, names of the mesh are back", func(t *testing.T) {
		again, err := proxy.Ensure(t.Context(), cfg)
		if err != nil || again == pid {
			t.Fatalf("%d, %v: want a new process", again, err)
		}
		if s := asks("udp", world, "orders."); s != "NOERROR 198.18.0.2" {
			t.Errorf("%s", s)
		}
	})

	t.Run("stopped, its entry is gone at once", func(t *testing.T) {
		st, err := proxy.Ask(t.Context(), c.Socket)
		if err != nil {
			t.Fatal(err)
		}
		if err := proxy.Stop(t.Context(), c.Socket); err != nil {
			t.Fatal(err)
		}
		var e bpfobj.InlayDnsProxy
		if err := n.maps.DnsProxies.Lookup(&st.Netns, &e); err == nil {
			t.Errorf("entry %+v stays", e)
		}
		if s := asks("udp", world, "orders."); s != "NOERROR 203.0.113.9" {
			t.Errorf("%s", s)
		}
	})

	t.Run("other maps, another process", func(t *testing.T) {
		first, err := proxy.Ensure(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		spec, err := n.maps.DnsProxies.Info()
		if err != nil {
			t.Fatal(err)
		}
		// As after `inlay node cleanup` and a new start: the same path, another map.
		fresh, err := ebpf.NewMap(&ebpf.MapSpec{Name: "dns_proxies", Type: spec.Type, KeySize: spec.KeySize, ValueSize: spec.ValueSize, MaxEntries: spec.MaxEntries, Flags: spec.Flags})
		if err != nil {
			t.Fatal(err)
		}
		defer fresh.Close()
		path := filepath.Join(n.pin, "v"+load.Layout, "maps", "dns_proxies")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := fresh.Pin(path); err != nil {
			t.Fatal(err)
		}
		other := cfg
		if other.MapID, err = proxy.MapID(&bpfobj.InlayMaps{DnsProxies: fresh}); err != nil {
			t.Fatal(err)
		}
		second, err := proxy.Ensure(t.Context(), other)
		if err != nil || second == first {
			t.Fatalf("%d then %d, %v: want a new process", first, second, err)
		}
		st, err := proxy.Ask(t.Context(), c.Socket)
		if err != nil {
			t.Fatal(err)
		}
		var e bpfobj.InlayDnsProxy
		if err := fresh.Lookup(&st.Netns, &e); err != nil {
			t.Errorf("no heartbeat in the new map: %v", err)
		}
	})
}
