package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// Tables is what the proxy reads and writes in the kernel. Its methods are called concurrently and
// must not block.
type Tables interface {
	// Name returns the virtual addresses of a service under NAME.NAMESPACE in lower case; false when
	// there is none.
	Name(name string) (Addresses, bool, error)
	// Client says who asks from an address, over UDP or TCP; false when the hooks did not tell.
	Client(from netip.AddrPort, tcp bool) (Client, bool, error)
	// Beat writes that the proxy of a network namespace is alive and where it listens; an address
	// that is not valid is none.
	Beat(netns uint64, v4, v6 netip.AddrPort) error
	// Leave takes that back. What is not there is no error.
	Leave(netns uint64) error
}

// Addresses of a service; one that is not valid does not exist.
type Addresses struct{ V4, V6 netip.Addr }

// Client is a program that asks.
type Client struct {
	Cgroup uint64
	// Namespace of its service; empty when its cgroup is no workload any more.
	Namespace string
	// Resolver is whom it meant to ask; not valid when that is left to the node.
	Resolver netip.AddrPort
}

type mapTables struct{ maps *bpfobj.InlayMaps }

// FromMaps makes Tables of the agent's maps, which must stay open as long as they are used.
func FromMaps(m *bpfobj.InlayMaps) (Tables, error) {
	if m == nil {
		return nil, errors.New("no maps: want those that a node agent pinned; start one with `inlay node --ebpf`")
	}
	for _, need := range []struct {
		name string
		m    *ebpf.Map
	}{{"names", m.Names}, {"workloads", m.Workloads}, {"dns_clients", m.DnsClients}, {"dns_proxies", m.DnsProxies}} {
		if need.m == nil {
			return nil, fmt.Errorf("map %s is not open: want names, workloads, dns_clients and dns_proxies", need.name)
		}
	}
	return mapTables{m}, nil
}

// MapID is Status.MapID of a proxy that uses these maps.
func MapID(m *bpfobj.InlayMaps) (uint32, error) {
	info, err := m.DnsProxies.Info()
	if err != nil {
		return 0, fmt.Errorf("map dns_proxies: %w", err)
	}
	id, ok := info.ID()
	if !ok {
		return 0, errors.New("map dns_proxies: the kernel does not tell its number: want Linux 6.1 or newer")
	}
	return uint32(id), nil
}

func (t mapTables) Name(name string) (Addresses, bool, error) {
	key, ok := nameKey(name)
	if !ok {
		return Addresses{}, false, nil
	}
	var v bpfobj.InlayName
	if err := t.maps.Names.Lookup(&key, &v); err != nil {
		return Addresses{}, false, absent("names", err)
	}
	a := Addresses{V4: address(v.Addr4), V6: address(v.Addr6)}
	if a.V4.IsValid() && !a.V4.Is4() {
		return Addresses{}, false, fmt.Errorf("map names: %s: addr4 is %s: want an IPv4 address, v4-mapped", name, a.V4)
	}
	return a, true, nil
}

func (t mapTables) Client(from netip.AddrPort, tcp bool) (Client, bool, error) {
	key := bpfobj.InlaySvcKey{Addr: rawAddr(from.Addr()), Port: rawPort(from.Port()), Proto: unix.IPPROTO_UDP}
	if tcp {
		key.Proto = unix.IPPROTO_TCP
	}
	var v bpfobj.InlayDnsClient
	if err := t.maps.DnsClients.Lookup(&key, &v); err != nil {
		return Client{}, false, absent("dns_clients", err)
	}
	c := Client{Cgroup: v.Cgroup}
	// A link-local address says nothing without its interface, which the hooks do not see.
	if a, port := address(v.Addr), hostPort(v.Port); a.IsValid() && port != 0 && !a.IsLinkLocalUnicast() {
		c.Resolver = netip.AddrPortFrom(a, port)
	}
	var w bpfobj.InlayWorkload
	if err := t.maps.Workloads.Lookup(&v.Cgroup, &w); err != nil {
		return c, true, absent("workloads", err)
	}
	c.Namespace = text(w.Ns[:])
	return c, true, nil
}

func (t mapTables) Beat(netns uint64, v4, v6 netip.AddrPort) error {
	var now unix.Timespec
	// The clock of bpf_ktime_get_ns, by which the hooks judge the age.
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("monotonic clock: %w", err)
	}
	v := bpfobj.InlayDnsProxy{Heartbeat: uint64(now.Nano())}
	if v4.IsValid() {
		v.Addr4, v.Port4 = rawAddr(v4.Addr()), rawPort(v4.Port())
	}
	if v6.IsValid() {
		v.Addr6, v.Port6 = rawAddr(v6.Addr()), rawPort(v6.Port())
	}
	if err := t.maps.DnsProxies.Put(&netns, &v); err != nil {
		return fmt.Errorf("map dns_proxies: network namespace %d: %w", netns, err)
	}
	return nil
}

func (t mapTables) Leave(netns uint64) error {
	if err := t.maps.DnsProxies.Delete(&netns); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("map dns_proxies: network namespace %d: %w", netns, err)
	}
	return nil
}

func absent(name string, err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return fmt.Errorf("map %s: %w", name, err)
}

// nameKey is the key of a name; false when no key could hold it with a NUL at its end.
func nameKey(name string) (k bpfobj.InlayNameKey, ok bool) {
	if name == "" || len(name) >= len(k.Text) {
		return k, false
	}
	for i := range len(name) {
		k.Text[i] = int8(name[i])
	}
	return k, true
}

// text is a NUL-padded string of C.
func text(c []int8) string {
	b := make([]byte, 0, len(c))
	for _, x := range c {
		if x == 0 {
			break
		}
		b = append(b, byte(x))
	}
	return string(b)
}

// address is not valid for the address of zeros, which means none. IPv4 is held v4-mapped.
func address(a bpfobj.InlayAddr) netip.Addr {
	if a.B == [16]byte{} {
		return netip.Addr{}
	}
	return netip.AddrFrom16(a.B).Unmap()
}

func rawAddr(a netip.Addr) bpfobj.InlayAddr { return bpfobj.InlayAddr{B: a.As16()} }

// rawPort is a port in network order, as it lies in a map's key.
func rawPort(p uint16) uint16 {
	return binary.NativeEndian.Uint16([]byte{byte(p >> 8), byte(p)})
}

func hostPort(p uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], p)
	return binary.BigEndian.Uint16(b[:])
}
