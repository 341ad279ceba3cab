package tables

import (
	"encoding/binary"
	"net/netip"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// mapped is an address as the maps hold it: 16 bytes, IPv4 as ::ffff:a.b.c.d.
func mapped(a netip.Addr) bpfobj.InlayAddr {
	return bpfobj.InlayAddr{B: a.As16()}
}

// htons is a port in network order, as the maps hold it.
func htons(p uint16) uint16 { return binary.NativeEndian.Uint16([]byte{byte(p >> 8), byte(p)}) }

func ntohs(p uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], p)
	return binary.BigEndian.Uint16(b[:])
}

func svcKey(a netip.Addr, port uint16, proto uint8) bpfobj.InlaySvcKey {
	return bpfobj.InlaySvcKey{Addr: mapped(a), Port: htons(port), Proto: proto}
}

func addrPort(a bpfobj.InlayAddr, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(a.B).Unmap(), ntohs(port))
}

// putText writes s NUL-padded into a C string; what is too long was refused before.
func putText(to []int8, s string) {
	for i := 0; i < len(s) && i < len(to)-1; i++ {
		to[i] = int8(s[i])
	}
}

// text reads a NUL-padded C string.
func text(from []int8) string {
	b := make([]byte, 0, len(from))
	for _, c := range from {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return string(b)
}
