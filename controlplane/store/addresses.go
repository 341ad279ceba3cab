package store

import (
	"encoding/json"
	"fmt"
	"strings"

	"go.etcd.io/bbolt"

	"github.com/inlay-mesh/inlay/controlplane/registry/vip"
)

// addressRecord is the number of a service's virtual addresses on disk, under NAMESPACE/NAME. The
// addresses are not in it: they follow from the ranges of the configuration.
type addressRecord struct {
	Index uint32 `json:"index"`
}

// WriteVirtualIndexes puts and deletes numbers by service, all or none. It implements vip.Store.
func (s *Store) WriteVirtualIndexes(put []vip.Given, del []vip.Service) error {
	return s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(addressesBucket)
		b.FillPercent = 0.9 // mostly written once, in order
		for _, g := range put {
			v, err := json.Marshal(addressRecord{Index: g.Index})
			if err != nil {
				return fmt.Errorf("virtual address of %s: %w", addressKey(g.Service), err)
			}
			if err := b.Put([]byte(addressKey(g.Service)), v); err != nil {
				return fmt.Errorf("virtual address of %s: %w", addressKey(g.Service), err)
			}
		}
		for _, svc := range del {
			if err := b.Delete([]byte(addressKey(svc))); err != nil {
				return fmt.Errorf("virtual address of %s: %w", addressKey(svc), err)
			}
		}
		return nil
	})
}

// VirtualIndexes returns every number, by namespace and name. It implements vip.Store.
func (s *Store) VirtualIndexes() ([]vip.Given, error) {
	var out []vip.Given
	err := s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(addressesBucket).ForEach(func(k, v []byte) error {
			if err := plausible(tx, k, v); err != nil {
				return err
			}
			var rec addressRecord
			if err := json.Unmarshal(v, &rec); err != nil {
				return fmt.Errorf("virtual address of %.200q: %w", k, err)
			}
			namespace, name, ok := strings.Cut(string(k), "/")
			if !ok {
				return fmt.Errorf("virtual address of %.200q: want NAMESPACE/NAME", k)
			}
			out = append(out, vip.Given{Service: vip.Service{Namespace: namespace, Name: name}, Index: rec.Index})
			return nil
		})
	})
	return out, err
}

func addressKey(s vip.Service) string { return s.Namespace + "/" + s.Name }
