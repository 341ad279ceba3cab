package flow_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/flow"
	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// role has a process of this test binary be a workload: NETWORK ADDRESS TIMES; or a reader of a
// ring: "reader" DIRECTORY 0.
const role = "INLAY_FLOW_ROLE"

func TestMain(m *testing.M) {
	if words := strings.Fields(os.Getenv(role)); len(words) == 3 {
		if words[0] == "reader" {
			fmt.Fprintln(os.Stderr, readPins(words[1]))
			os.Exit(1)
		}
		times, _ := strconv.Atoi(words[2])
		dialed := 0
		for range times {
			if err := say(words[0], words[1]); err == nil {
				dialed++
			} else if !errors.Is(err, syscall.ECONNREFUSED) {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		fmt.Println(dialed)
		return
	}
	os.Exit(m.Run())
}

// say sends ten bytes and reads what comes back, up to ten.
func say(network, address string) error {
	c, err := net.Dial(network, address)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write([]byte("0123456789")); err != nil {
		return err
	}
	_, err = io.ReadFull(c, make([]byte, 10))
	return err
}

// node is the real programs on a cgroup of this test.
type node struct {
	maps *bpfobj.InlayMaps
	leaf string
	id   uint64 // of the leaf
}

func newNode(t *testing.T) *node {
	t.Helper()
	if err := load.Check(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("programs cannot run here, and CI=true allows no skip: %v", err)
		}
		t.Skipf("SKIPPED, not tested here: %v", err)
	}
	mount, err := load.FindCgroup2()
	if err != nil {
		t.Fatal(err)
	}
	if err := load.EnsureBPFFS(""); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("inlay-test-%08x", rand.Uint32())
	root, pin := filepath.Join(mount, name), filepath.Join(load.BPFFS, name)
	n := &node{leaf: filepath.Join(root, "billing.shop-1")}
	t.Cleanup(func() {
		if _, err := load.Cleanup(pin); err != nil {
			t.Error(err)
		}
		for _, dir := range []string{n.leaf, root} {
			if err := os.Remove(dir); err != nil && !os.IsNotExist(err) {
				t.Error(err)
			}
		}
	})
	set, err := load.Open(load.Config{Cgroup: root, Pin: pin, MapSizes: map[string]uint32{
		"services": 64, "slots": 64, "endpoints": 64, "policies": 64, "names": 64, "events": 4096,
	}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { set.Close() })
	n.maps = set.Maps()
	if err := os.Mkdir(n.leaf, 0o755); err != nil {
		t.Fatal(err)
	}
	if n.id, err = load.CgroupID(n.leaf); err != nil {
		t.Fatal(err)
	}
	if err := n.maps.Workloads.Put(n.id, bpfobj.InlayWorkload{Identity: billing}); err != nil {
		t.Fatal(err)
	}
	// A service without endpoint.
	if err := n.maps.Services.Put(bpfobj.InlaySvcKey{Addr: addr("198.18.0.1"), Port: be(8080), Proto: 6}, bpfobj.InlaySvc{Id: 1, Gen: 1}); err != nil {
		t.Fatal(err)
	}
	return n
}

// dial has a process of the workload dial so often, and returns how often it got an answer.
func (n *node) dial(t *testing.T, network, address string, times int) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(n.leaf)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %d", role, network, address, times))
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("workload: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// echo answers on a TCP and a UDP port of loopback.
func echo(t *testing.T) (tcp, udp string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{}, 2)
	go func() {
		defer func() { ended <- struct{}{} }()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}
	}()
	go func() {
		defer func() { ended <- struct{}{} }()
		b := make([]byte, 64)
		for {
			n, from, err := p.ReadFrom(b)
			if err != nil {
				return
			}
			p.WriteTo(b[:n], from)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		p.Close()
		<-ended
		<-ended
	})
	return l.Addr().String(), p.LocalAddr().String()
}

// The real hooks, one after the other on the same node: loading them takes a while.
func TestRealPrograms(t *testing.T) {
	n := newNode(t)
	h := hand{make(chan func(), 1)}
	l := flow.New(flow.Config{Maps: n.maps, Namer: names{}, Clock: h, UDPIdle: time.Nanosecond})
	const refused = 200
	t.Run("a ring that nobody reads overflows, counted exactly", func(t *testing.T) {
		if got := n.dial(t, "tcp", "198.18.0.1:8080", refused); got != "0" {
			t.Fatalf("%s connections to a service without endpoint", got)
		}
		made, kept, lost := l.Counts()
		if made != refused || kept != 0 || lost != refused-inPage {
			t.Fatalf("made %d kept %d lost %d, want %d, 0, %d", made, kept, lost, refused, refused-inPage)
		}
	})
	running(t, l)
	sweep := <-h.timers
	t.Run("what had room is kept", func(t *testing.T) {
		receive(t, l, inPage)
		if made, kept, lost := l.Counts(); made != kept+lost || kept != inPage {
			t.Errorf("made %d kept %d lost %d, want %d kept and the rest lost", made, kept, lost, inPage)
		}
		for _, f := range observe(t, l, &nodepb.ObserveRequest{}) {
			if f.GetKind() != "denied" || f.GetReason() != "no_endpoint" || f.GetErrno() != 111 || f.GetProtocol() != "tcp" ||
				f.GetFrom().GetName() != "billing.shop" || f.GetTo().GetName() != "orders.default" || f.GetServiceAddress() != "198.18.0.1:8080" {
				t.Fatalf("got %v", f)
			}
		}
	})
	tcp, udp := echo(t)
	t.Run("connections are told at their end", func(t *testing.T) {
		if got := n.dial(t, "tcp", tcp, 3); got != "3" {
			t.Fatalf("%s of 3 connections", got)
		}
		receive(t, l, inPage+3)
		flows := observe(t, l, &nodepb.ObserveRequest{Query: "kind=close and protocol=tcp"})
		if len(flows) != 3 {
			t.Errorf("%d connections told, want 3", len(flows))
		}
		for _, f := range flows {
			if f.GetFrom().GetName() != "billing.shop" || f.GetTo().GetName() != "host" || f.GetTo().GetAddress() != tcp ||
				f.GetDirection() != "egress" || f.GetBytesSent() != 10 || f.GetBytesReceived() != 10 || f.GetRtt() == nil ||
				f.GetDuration() == nil || f.GetVerdict() != "allowed" || f.GetReason() != "no_policy" {
				t.Errorf("got %v", f)
			}
		}
	})
	t.Run("datagram exchanges are swept", func(t *testing.T) {
		if got := n.dial(t, "udp", udp, 2); got != "2" {
			t.Fatalf("%s of 2 exchanges", got)
		}
		sweep()
		<-h.timers
		flows := observe(t, l, &nodepb.ObserveRequest{Query: "protocol=udp"})
		if len(flows) != 2 {
			t.Errorf("%d exchanges told, want 2", len(flows))
		}
		for _, f := range flows {
			if f.GetKind() != "close" || f.GetFrom().GetName() != "billing.shop" || f.GetTo().GetAddress() != udp ||
				f.GetBytesSent() != 10 || f.GetBytesReceived() != 10 {
				t.Errorf("got %v", f)
			}
		}
	})
	if made, kept, lost := l.Counts(); made != refused+3 || kept != inPage+3 || made != kept+lost {
		t.Errorf("made %d kept %d lost %d at the end", made, kept, lost)
	}
	if l.Malformed() != 0 {
		t.Errorf("%d malformed", l.Malformed())
	}
	for _, f := range observe(t, l, &nodepb.ObserveRequest{}) {
		if ago := noon.Sub(f.GetTime().AsTime()); ago < 0 || ago > time.Minute {
			t.Errorf("told to be %v ago", ago)
		}
	}
}
