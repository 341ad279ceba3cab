package ca

import (
	"bytes"
	"crypto/rand"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// FuzzState: whatever the file holds is refused or survives writing and reading unchanged.
func FuzzState(f *testing.F) {
	s, err := newRoot(spiffeid.RequireTrustDomainFromString("inlay.local"), time.Now(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	raw, err := s.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte("inlay-ca 1\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := decodeState(raw)
		if err != nil {
			return
		}
		once, err := s.encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeState(once)
		if err != nil {
			t.Fatalf("written, but not read again: %v", err)
		}
		twice, err := again.encode()
		if err != nil || !bytes.Equal(once, twice) || !again.root.Equal(s.root) {
			t.Fatal("changed by writing and reading")
		}
	})
}

// FuzzCSR: no request makes the authority panic.
func FuzzCSR(f *testing.F) {
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(_ *testing.T, der []byte) { _, _ = publicKey(der) })
}
