package store

import (
	"encoding/json"
	"fmt"
	"net/netip"

	"go.etcd.io/bbolt"

	"github.com/inlay-mesh/inlay/controlplane/registry"
)

// instanceRecord is one registered instance on disk. The end of its lease is not in it: after a
// restart every instance gets a fresh one, so a renewal writes nothing.
type instanceRecord struct {
	Namespace  string            `json:"namespace"`
	Service    string            `json:"service"`
	Version    string            `json:"version,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Region     string            `json:"region,omitempty"`
	Zone       string            `json:"zone,omitempty"`
	SubZone    string            `json:"sub_zone,omitempty"`
	Weight     uint32            `json:"weight"`
	Ports      []portRecord      `json:"ports"`
	Addresses  []netip.Addr      `json:"addresses,omitempty"`
	MeshTLS    bool              `json:"mesh_tls,omitempty"`
	Draining   bool              `json:"draining,omitempty"`
	SDKVersion string            `json:"sdk_version,omitempty"`
	RunID      string            `json:"run_id,omitempty"`
	Identity   string            `json:"identity,omitempty"`
}

type portRecord struct {
	Port      uint16           `json:"port"`
	Protocol  string           `json:"protocol"`
	Addresses []netip.AddrPort `json:"addresses"`
}

// WriteInstances puts and deletes instances by id, all or none. It implements registry.Leases.
func (s *Store) WriteInstances(put []registry.Instance, del []string) error {
	return s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(instancesBucket)
		for _, in := range put {
			v, err := json.Marshal(recordOf(in))
			if err != nil {
				return fmt.Errorf("instance %q: %w", in.ID, err)
			}
			if err := b.Put([]byte(in.ID), v); err != nil {
				return fmt.Errorf("instance %q: %w", in.ID, err)
			}
		}
		for _, id := range del {
			if err := b.Delete([]byte(id)); err != nil {
				return fmt.Errorf("instance %q: %w", id, err)
			}
		}
		return nil
	})
}

// Instances returns every stored instance by id; Expires is zero. It implements registry.Leases.
func (s *Store) Instances() ([]registry.Instance, error) {
	var out []registry.Instance
	err := s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(instancesBucket).ForEach(func(k, v []byte) error {
			if err := plausible(tx, k, v); err != nil {
				return err
			}
			var rec instanceRecord
			if err := json.Unmarshal(v, &rec); err != nil {
				return fmt.Errorf("instance %.200q: %w", k, err)
			}
			out = append(out, rec.instance(string(k)))
			return nil
		})
	})
	return out, err
}

func recordOf(in registry.Instance) instanceRecord {
	rec := instanceRecord{
		Namespace: in.Namespace, Service: in.Service, Version: in.Version, Labels: in.Labels,
		Region: in.Locality.Region, Zone: in.Locality.Zone, SubZone: in.Locality.SubZone,
		Weight: in.Weight, MeshTLS: in.MeshTLS, Draining: in.Draining,
		SDKVersion: in.SDKVersion, RunID: in.RunID, Identity: in.Identity, Addresses: in.Addresses,
	}
	for _, p := range in.Ports {
		rec.Ports = append(rec.Ports, portRecord(p))
	}
	return rec
}

func (rec instanceRecord) instance(id string) registry.Instance {
	in := registry.Instance{
		ID: id, Namespace: rec.Namespace, Service: rec.Service, Version: rec.Version, Labels: rec.Labels,
		Locality: registry.Locality{Region: rec.Region, Zone: rec.Zone, SubZone: rec.SubZone},
		Weight:   rec.Weight, MeshTLS: rec.MeshTLS, Draining: rec.Draining,
		SDKVersion: rec.SDKVersion, RunID: rec.RunID, Identity: rec.Identity, Addresses: rec.Addresses,
	}
	for _, p := range rec.Ports {
		in.Ports = append(in.Ports, registry.PortBinding(p))
	}
	return in
}
