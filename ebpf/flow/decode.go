package flow

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// Protocols of records, IPPROTO_*.
const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
)

const (
	kindClose  = uint8(bpfobj.InlayEventKindEVENT_CLOSE)
	kindSample = uint8(bpfobj.InlayEventKindEVENT_SAMPLE)
	kindDenied = uint8(bpfobj.InlayEventKindEVENT_DENIED)
	kindAudit  = uint8(bpfobj.InlayEventKindEVENT_AUDIT)

	dirEgress  = uint8(bpfobj.InlayDirDIR_EGRESS)
	dirIngress = uint8(bpfobj.InlayDirDIR_INGRESS)

	verdictDeny = uint8(bpfobj.InlayVerdictVERDICT_DENY)
)

// RecordSize is the length of a record, struct event, in bytes.
const RecordSize = int(unsafe.Sizeof(bpfobj.InlayEvent{}))

// Decode reads one record. It refuses what the programs of this layout never make: another
// length, an unknown kind, verdict, direction or protocol. Ports stay in network order.
func Decode(raw []byte) (bpfobj.InlayEvent, error) {
	var e bpfobj.InlayEvent
	if len(raw) != RecordSize {
		return e, fmt.Errorf("record of %d bytes: want %d", len(raw), RecordSize)
	}
	// Both sides of the ring are one machine and one struct without implicit padding (types.h
	// asserts its size), so its bytes are the value.
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&e)), RecordSize), raw)
	switch {
	case e.Kind < kindClose || e.Kind > kindAudit:
		return e, fmt.Errorf("record of kind %d: want %d to %d", e.Kind, kindClose, kindAudit)
	case e.Verdict > verdictDeny:
		return e, fmt.Errorf("record with verdict %d: want 0 to %d", e.Verdict, verdictDeny)
	case e.Dir > dirIngress:
		return e, fmt.Errorf("record of direction %d: want %d or %d", e.Dir, dirEgress, dirIngress)
	}
	switch e.Proto {
	case protoICMP, protoTCP, protoUDP, protoICMPv6:
		return e, nil
	}
	return e, fmt.Errorf("record of protocol %d: want %d, %d, %d or %d", e.Proto, protoTCP, protoUDP, protoICMP, protoICMPv6)
}

// Encode returns the bytes of e as a program would have written them.
func Encode(e bpfobj.InlayEvent) []byte {
	return append([]byte(nil), unsafe.Slice((*byte)(unsafe.Pointer(&e)), RecordSize)...)
}

// addrPort reads an address and a port in network order; a v4-mapped address is IPv4. The zero
// address of either family, which says that there is none, gives an invalid Addr with the port.
func addrPort(a bpfobj.InlayAddr, port uint16) netip.AddrPort {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	at := netip.AddrPortFrom(netip.Addr{}, binary.BigEndian.Uint16(b[:]))
	if ip := netip.AddrFrom16(a.B).Unmap(); !ip.IsUnspecified() {
		at = netip.AddrPortFrom(ip, at.Port())
	}
	return at
}
