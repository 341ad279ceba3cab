package identity

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
)

// Number is the numeric identity of a workload: what the kernel compares instead of names. It
// follows from the names alone (the first eight bytes of a SHA-256 over them), so that it is the
// same on every node, over every restart, and without anybody to ask. It is never below 256: those
// are reserved (0 unknown, 1 host, 2 world, 3 agent). Nil and empty labels are equal.
func Number(namespace, service string, labels map[string]string) uint64 {
	h := sha256.New()
	field := func(s string) {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
	field("inlay identity 1")
	field(namespace)
	field(service)
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		field(k)
		field(labels[k])
	}
	for sum := h.Sum(nil); ; {
		for i := 0; i+8 <= len(sum); i += 8 {
			if n := binary.LittleEndian.Uint64(sum[i:]); n >= 256 {
				return n
			}
		}
		again := sha256.Sum256(sum)
		sum = again[:]
	}
}
