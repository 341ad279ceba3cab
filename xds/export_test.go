package xds

import (
	"crypto/sha256"
	"encoding/binary"
)

// Sealed puts the right header before a payload.
func Sealed(payload []byte) []byte {
	sum := sha256.Sum256(payload)
	b := binary.BigEndian.AppendUint32([]byte(snapshotMagic), snapshotVersion)
	return append(append(b, sum[:]...), payload...)
}
