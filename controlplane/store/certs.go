package store

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"go.etcd.io/bbolt"

	"github.com/inlay-mesh/inlay/controlplane/ca"
)

// certRecord is one signed certificate on disk: what it says, never the key. Its key in the bucket
// begins with the expiry, so that those to forget come first.
type certRecord struct {
	SPIFFEID  string    `json:"spiffe_id"`
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	Authority bool      `json:"authority,omitempty"`
}

// RecordCert remembers a certificate and forgets those that have expired. It implements ca.Log.
func (s *Store) RecordCert(c ca.Cert) error {
	v, err := json.Marshal(certRecord(c))
	if err != nil {
		return fmt.Errorf("certificate %s: %w", c.Serial, err)
	}
	return s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(certsBucket)
		cur := b.Cursor()
		now := uint64(max(0, s.cfg.Clock.Now().Unix()))
		for k, _ := cur.First(); len(k) >= 8 && binary.BigEndian.Uint64(k) < now; k, _ = cur.First() {
			if err := cur.Delete(); err != nil {
				return err
			}
		}
		key := binary.BigEndian.AppendUint64(nil, uint64(max(0, c.NotAfter.Unix())))
		return b.Put(append(key, c.Serial...), v)
	})
}

// Certs returns the certificates that have not expired, the next to expire first. It implements
// ca.Log.
func (s *Store) Certs() ([]ca.Cert, error) {
	var out []ca.Cert
	now := s.cfg.Clock.Now()
	err := s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(certsBucket).ForEach(func(k, v []byte) error {
			if err := plausible(tx, k, v); err != nil {
				return err
			}
			var rec certRecord
			if err := json.Unmarshal(v, &rec); err != nil {
				return fmt.Errorf("certificate %x: %w", k, err)
			}
			if rec.NotAfter.After(now) {
				out = append(out, ca.Cert(rec))
			}
			return nil
		})
	})
	return out, err
}
