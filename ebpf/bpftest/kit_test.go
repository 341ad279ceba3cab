package bpftest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// need skips a test that the machine cannot run; CI=true makes that a failure.
func need(t testing.TB) {
	t.Helper()
	lack := ""
	if os.Geteuid() != 0 {
		lack = "these tests load programs into the kernel: run them as root"
	} else if cgroup2(t) == "" {
		lack = "no cgroup2 hierarchy is mounted"
	}
	if lack != "" {
		lacks(t, lack)
	}
}

// lacks skips a test for what this machine has not; in CI, which has it, that is a failure.
func lacks(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip("SKIPPED: " + what)
}

func cgroup2(t testing.TB) string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if i := strings.Index(line, " - cgroup2 "); i >= 0 && len(f) > 4 {
			return f[4]
		}
	}
	return ""
}

var objects = map[string]func() (*ebpf.CollectionSpec, error){
	"connect": bpfobj.LoadConnect, "sendmsg": bpfobj.LoadSendmsg, "recvmsg": bpfobj.LoadRecvmsg,
	"getpeername": bpfobj.LoadGetpeername, "bind": bpfobj.LoadBind, "sock": bpfobj.LoadSock,
	"sockops": bpfobj.LoadSockops, "skb": bpfobj.LoadSkb, "sklookup": bpfobj.LoadSklookup,
	"trace": bpfobj.LoadTrace, "iter": bpfobj.LoadIter, "iterdrop": bpfobj.LoadIterdrop,
	"decide": bpfobj.LoadDecide,
}

// kit is one set of maps and programs, attached to a cgroup that this test made.
type kit struct {
	t     testing.TB
	maps  map[string]*ebpf.Map
	progs map[string]*ebpf.Program
	root  string
	ring  *ringbuf.Reader
	seen  []bpfobj.InlayEvent
}

// settings of a kit that differ from test to test.
type settings struct {
	without  []string // objects that stay away
	ring     uint32   // bytes of the ring buffer
	entries  map[string]uint32
	detached bool // loaded only
}

func newKit(t testing.TB, s settings) *kit {
	t.Helper()
	need(t)
	k := &kit{t: t, maps: map[string]*ebpf.Map{}, progs: map[string]*ebpf.Program{}}
	inlay, err := bpfobj.LoadInlay()
	if err != nil {
		t.Fatal(err)
	}
	for name, spec := range inlay.Maps {
		if strings.HasPrefix(name, ".") {
			continue
		}
		if name == "events" && s.ring != 0 {
			spec.MaxEntries = s.ring
		}
		if n := s.entries[name]; n != 0 {
			spec.MaxEntries = n
		}
		m, err := ebpf.NewMap(spec)
		if err != nil {
			t.Fatalf("map %s: %v", name, err)
		}
		t.Cleanup(func() { m.Close() })
		k.maps[name] = m
	}
	mount := cgroup2(t)
	k.root = filepath.Join(mount, "inlay-test-"+random())
	if err := os.Mkdir(k.root, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeCgroup(t, k.root) })
	if k.ring, err = ringbuf.NewReader(k.maps["events"]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.ring.Close() })
	if !s.detached {
		k.attach(s.without)
	}
	return k
}

// prog gives a program, NAME of OBJECT/NAME; its object is loaded when the first one is asked for.
func (k *kit) prog(name string) *ebpf.Program {
	k.t.Helper()
	if p := k.progs[name]; p != nil {
		return p
	}
	stem, _, _ := strings.Cut(name, "/")
	spec, err := objects[stem]()
	if err != nil {
		k.t.Fatal(err)
	}
	for name, value := range map[string]any{"managed_level": uint32(2), "own_netns": netnsCookie(k.t), "sample_after": uint64(0)} {
		if v := spec.Variables[name]; v != nil {
			if err := v.Set(value); err != nil {
				k.t.Fatal(err)
			}
		}
	}
	for name, m := range spec.Maps {
		if own := k.maps[name]; own != nil {
			m.MaxEntries = own.MaxEntries()
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: k.maps})
	if err != nil {
		if ve := (*ebpf.VerifierError)(nil); errors.As(err, &ve) {
			k.t.Fatalf("%s: %s", stem, strings.Join(ve.Log[max(0, len(ve.Log)-20):], "\n"))
		}
		k.t.Fatalf("%s: %v", stem, err)
	}
	k.t.Cleanup(c.Close)
	for name, p := range c.Programs {
		k.progs[stem+"/"+name] = p
	}
	if k.progs[name] == nil {
		k.t.Fatalf("object %s has no program %s", stem, name)
	}
	return k.progs[name]
}

func (k *kit) attach(without []string) {
	k.t.Helper()
	for name, at := range map[string]ebpf.AttachType{
		"connect/connect4": ebpf.AttachCGroupInet4Connect, "connect/connect6": ebpf.AttachCGroupInet6Connect,
		"sendmsg/sendmsg4": ebpf.AttachCGroupUDP4Sendmsg, "sendmsg/sendmsg6": ebpf.AttachCGroupUDP6Sendmsg,
		"recvmsg/recvmsg4": ebpf.AttachCGroupUDP4Recvmsg, "recvmsg/recvmsg6": ebpf.AttachCGroupUDP6Recvmsg,
		"getpeername/getpeername4": ebpf.AttachCgroupInet4GetPeername,
		"getpeername/getpeername6": ebpf.AttachCgroupInet6GetPeername,
		"bind/bind4":               ebpf.AttachCGroupInet4Bind, "bind/bind6": ebpf.AttachCGroupInet6Bind,
		"sock/sock_create": ebpf.AttachCGroupInetSockCreate, "sock/sock_release": ebpf.AttachCgroupInetSockRelease,
		"sockops/tcp_events": ebpf.AttachCGroupSockOps,
		"skb/skb_ingress":    ebpf.AttachCGroupInetIngress, "skb/skb_egress": ebpf.AttachCGroupInetEgress,
	} {
		if has(without, name) {
			continue
		}
		l, err := link.AttachCgroup(link.CgroupOptions{Path: k.root, Attach: at, Program: k.prog(name)})
		if err != nil {
			k.t.Fatalf("%s: %v", name, err)
		}
		k.t.Cleanup(func() { l.Close() })
	}
	if !has(without, "trace") {
		for _, name := range []string{"trace/set_state", "trace/retransmit"} {
			l, err := link.AttachTracing(link.TracingOptions{Program: k.prog(name)})
			if err != nil {
				k.t.Fatalf("%s: %v", name, err)
			}
			k.t.Cleanup(func() { l.Close() })
		}
	}
	if !has(without, "sklookup") {
		ns, err := os.Open("/proc/self/ns/net")
		if err != nil {
			k.t.Fatal(err)
		}
		defer ns.Close()
		l, err := link.AttachNetNs(int(ns.Fd()), k.prog("sklookup/syn_lookup"))
		if err != nil {
			k.t.Fatal(err)
		}
		k.t.Cleanup(func() { l.Close() })
	}
}

func has(without []string, name string) bool {
	for _, w := range without {
		if strings.HasPrefix(name, w) {
			return true
		}
	}
	return false
}

// workload starts a process in a cgroup of its own and registers it under an identity.
func (k *kit) workload(name string, id uint64, ownNetns bool) *child {
	k.t.Helper()
	c := k.stranger(name, ownNetns)
	c.id = id
	k.put("workloads", c.cgroup, bpfobj.InlayWorkload{Identity: id})
	return c
}

// stranger starts a process below the managed root that nobody registered.
func (k *kit) stranger(name string, ownNetns bool) *child {
	k.t.Helper()
	dir := filepath.Join(k.root, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { removeCgroup(k.t, dir) })
	st, err := os.Stat(dir)
	if err != nil {
		k.t.Fatal(err)
	}
	c := startChild(k.t.(*testing.T), dir, ownNetns)
	c.cgroup = st.Sys().(*syscall.Stat_t).Ino
	return c
}

func (k *kit) put(name string, key, value any) {
	k.t.Helper()
	if err := k.maps[name].Put(key, value); err != nil {
		k.t.Fatalf("map %s: %v", name, err)
	}
}

// service gives a service address one endpoint.
func (k *kit) service(vip, backend netip.AddrPort, proto uint8, id uint64) {
	k.t.Helper()
	n := rand.Uint32()
	b := bpfobj.InlayBackend{Addr: addr(backend.Addr()), Port: be16(backend.Port()), Identity: id}
	k.put("services", svcKey(vip, proto), bpfobj.InlaySvc{Id: n, Gen: 1, Slots: 1, Only: b})
	k.put("endpoints", svcKey(backend, proto), id)
}

// policy makes a workload default-deny in one direction, but for the peer on the ports lo to hi.
func (k *kit) policy(subject uint64, dir uint8, peer uint64, proto uint8, lo, hi uint16, seg bpfobj.InlaySeg) {
	k.t.Helper()
	var had bpfobj.InlaySubject
	if err := k.maps["subjects"].Lookup(subject, &had); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		k.t.Fatal(err)
	}
	set := rand.Uint32()
	seg.Lo, seg.Hi = lo, hi
	if seg.Audit == 0 {
		seg.Audit = seg.Action
	}
	ps := bpfobj.InlayPortSet{N: 1}
	ps.Segs[0] = seg
	k.put("port_sets", set, ps)
	key := bpfobj.InlayPolKey{Subject: subject, Peer: peer, Gen: had.Gen + 1, Dir: dir, Proto: proto}
	if peer == 0 {
		key.Kind = uint8(bpfobj.InlayPeerKindPEER_ANY)
	}
	k.put("policies", key, set)
	had.Gen++
	had.Flags = uint32(bpfobj.InlaySubjectFlagSUBJECT_DENY_EGRESS | bpfobj.InlaySubjectFlagSUBJECT_AUDIT_DENY_EGRESS)
	if dir == ingress {
		had.Flags = uint32(bpfobj.InlaySubjectFlagSUBJECT_DENY_INGRESS | bpfobj.InlaySubjectFlagSUBJECT_AUDIT_DENY_INGRESS)
	}
	had.Rule = [2]uint32{900, 901}
	had.AuditRule = [2]uint32{900, 901}
	k.put("subjects", subject, had)
}

const (
	egress  = uint8(bpfobj.InlayDirDIR_EGRESS)
	ingress = uint8(bpfobj.InlayDirDIR_INGRESS)
	allow   = uint8(bpfobj.InlayVerdictVERDICT_ALLOW)
	deny    = uint8(bpfobj.InlayVerdictVERDICT_DENY)

	closeKind  = uint8(bpfobj.InlayEventKindEVENT_CLOSE)
	sampleKind = uint8(bpfobj.InlayEventKindEVENT_SAMPLE)
	deniedKind = uint8(bpfobj.InlayEventKindEVENT_DENIED)
	auditKind  = uint8(bpfobj.InlayEventKindEVENT_AUDIT)

	host  = uint64(bpfobj.InlayIdID_HOST)
	world = uint64(bpfobj.InlayIdID_WORLD)
	agent = uint64(bpfobj.InlayIdID_AGENT)
)

// event waits for the next record that fits; those before it are passed over.
func (k *kit) event(what string, fits func(e bpfobj.InlayEvent) bool) bpfobj.InlayEvent {
	k.t.Helper()
	k.ring.SetDeadline(time.Now().Add(5 * time.Second))
	for {
		e, err := k.read()
		if err != nil {
			k.t.Fatalf("no record of %s: %v; seen: %+v", what, err, k.seen)
		}
		if fits(e) {
			return e
		}
	}
}

// none fails when the ring holds a record that fits.
func (k *kit) none(what string, fits func(e bpfobj.InlayEvent) bool) {
	k.t.Helper()
	k.ring.SetDeadline(time.Now().Add(-time.Second))
	for {
		e, err := k.read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if err != nil {
			k.t.Fatal(err)
		}
		if fits(e) {
			k.t.Errorf("%s: there is a record of it: %+v", what, e)
		}
	}
}

func (k *kit) read() (bpfobj.InlayEvent, error) {
	var e bpfobj.InlayEvent
	r, err := k.ring.Read()
	if err != nil {
		return e, err
	}
	err = binary.Read(bytes.NewReader(r.RawSample), binary.NativeEndian, &e)
	k.seen = append(k.seen, e)
	return e, err
}

func (k *kit) counter(c bpfobj.InlayCounter) uint64 {
	k.t.Helper()
	var each []uint64
	if err := k.maps["counters"].Lookup(uint32(c), &each); err != nil {
		k.t.Fatal(err)
	}
	var sum uint64
	for _, n := range each {
		sum += n
	}
	return sum
}

// sweep runs an iterator once.
func (k *kit) sweep(name string) {
	k.t.Helper()
	it, err := link.AttachIter(link.IterOptions{Program: k.prog(name)})
	if err != nil {
		k.t.Fatal(err)
	}
	defer it.Close()
	r, err := it.Open()
	if err != nil {
		k.t.Fatal(err)
	}
	defer r.Close()
	for b := make([]byte, 4096); ; {
		if n, err := r.Read(b); n == 0 || err != nil {
			return
		}
	}
}

// removeCgroup removes a cgroup once it has let go of its last process, a moment after that was waited
// for: the kernel tells of it in cgroup.events.
func removeCgroup(t testing.TB, dir string) {
	t.Helper()
	events, err := os.Open(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		t.Error(err)
		return
	}
	defer events.Close()
	var b [256]byte
	for {
		n, err := events.ReadAt(b[:], 0)
		if err != nil && !errors.Is(err, io.EOF) {
			t.Error(err)
			return
		}
		if bytes.Contains(b[:n], []byte("populated 0")) {
			break
		}
		fds := []unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}}
		if n, err := unix.Poll(fds, 5000); n == 0 && err == nil {
			t.Errorf("cgroup %s still holds processes", dir)
			return
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func random() string {
	const letters = "abcdefghijklmnopqrstuvwxyz"
	b := make([]byte, 10)
	for i := range b {
		b[i] = letters[rand.IntN(len(letters))]
	}
	return string(b)
}

func netnsCookie(t testing.TB) uint64 {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	n, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func addr(a netip.Addr) bpfobj.InlayAddr { return bpfobj.InlayAddr{B: a.As16()} }

func be16(p uint16) uint16 {
	return binary.NativeEndian.Uint16([]byte{byte(p >> 8), byte(p)})
}

func svcKey(a netip.AddrPort, proto uint8) bpfobj.InlaySvcKey {
	return bpfobj.InlaySvcKey{Addr: addr(a.Addr()), Port: be16(a.Port()), Proto: proto}
}
