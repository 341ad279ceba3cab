package xds

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// RawResource is one resource as it came from a server.
type RawResource struct {
	Type, Name string
	// Version is the server's word for these bytes; empty when it gave none.
	Version string
	Bytes   []byte // the value of the resource's Any
}

// Meta says for whom and from when a snapshot is.
type Meta struct {
	// TrustDomain and SPIFFEID bind the snapshot to one identity. An empty SPIFFEID means any
	// identity, an empty TrustDomain any trust domain.
	TrustDomain, SPIFFEID string
	// Revision of the configuration it was made from; empty when unknown.
	Revision string
	// Namespaces that the control plane announced.
	Namespaces []string
	// Written is when; kept to the nanosecond, in UTC.
	Written time.Time
}

// The format: magic, format version (4 bytes, big endian), SHA-256 of the payload, payload. The
// payload is protobuf wire format, so that fields can be added within one version:
// 1 trust domain, 2 SPIFFE ID, 3 revision, 4 namespace (repeated), 5 written (Unix ns),
// 6 resource (repeated): 1 type, 2 name, 3 version, 4 bytes.
const (
	snapshotMagic   = "inlayxds"
	snapshotVersion = 1
	snapshotHeader  = len(snapshotMagic) + 4 + sha256.Size
)

// EncodeSnapshot writes the file format shared by the cache and `inlay compile`. Resources are
// sorted by type and name, so equal contents are equal bytes.
func EncodeSnapshot(resources []RawResource, meta Meta) []byte {
	text := func(b []byte, num protowire.Number, s string) []byte {
		if s == "" {
			return b
		}
		return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), s)
	}
	var p []byte
	p = text(p, 1, meta.TrustDomain)
	p = text(p, 2, meta.SPIFFEID)
	p = text(p, 3, meta.Revision)
	for _, ns := range meta.Namespaces {
		p = protowire.AppendString(protowire.AppendTag(p, 4, protowire.BytesType), ns)
	}
	if !meta.Written.IsZero() {
		p = protowire.AppendVarint(protowire.AppendTag(p, 5, protowire.VarintType), uint64(meta.Written.UnixNano()))
	}
	sorted := slices.Clone(resources)
	slices.SortStableFunc(sorted, func(a, b RawResource) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name))
	})
	for _, r := range sorted {
		var m []byte
		m = text(m, 1, r.Type)
		m = text(m, 2, r.Name)
		m = text(m, 3, r.Version)
		m = protowire.AppendBytes(protowire.AppendTag(m, 4, protowire.BytesType), r.Bytes)
		p = protowire.AppendBytes(protowire.AppendTag(p, 6, protowire.BytesType), m)
	}
	out := make([]byte, 0, snapshotHeader+len(p))
	out = append(out, snapshotMagic...)
	out = binary.BigEndian.AppendUint32(out, snapshotVersion)
	sum := sha256.Sum256(p)
	out = append(out, sum[:]...)
	return append(out, p...)
}

// DecodeSnapshot reads what EncodeSnapshot wrote. It never panics. What to do about
// a fault depends on who wrote the file: the caller says it.
func DecodeSnapshot(b []byte) ([]RawResource, Meta, error) {
	var meta Meta
	if len(b) < snapshotHeader || string(b[:len(snapshotMagic)]) != snapshotMagic {
		return nil, meta, errors.New("not a configuration snapshot of Inlay (wrong first bytes)")
	}
	b = b[len(snapshotMagic):]
	switch v := binary.BigEndian.Uint32(b); {
	case v > snapshotVersion:
		return nil, meta, fmt.Errorf("snapshot format %d is newer than this program reads (%d; update it)", v, snapshotVersion)
	case v < snapshotVersion:
		return nil, meta, fmt.Errorf("snapshot format %d is older than any this program reads (%d)", v, snapshotVersion)
	}
	sum, payload := b[4:4+sha256.Size], b[4+sha256.Size:]
	if got := sha256.Sum256(payload); !bytes.Equal(sum, got[:]) {
		return nil, meta, errors.New("the checksum does not match: the file is damaged")
	}
	resources, err := decodePayload(payload, &meta)
	if err != nil {
		return nil, Meta{}, err
	}
	return resources, meta, nil
}

func decodePayload(b []byte, meta *Meta) ([]RawResource, error) {
	var out []RawResource
	err := eachField(b, func(num protowire.Number, s []byte, v uint64) error {
		switch num {
		case 1:
			meta.TrustDomain = string(s)
		case 2:
			meta.SPIFFEID = string(s)
		case 3:
			meta.Revision = string(s)
		case 4:
			meta.Namespaces = append(meta.Namespaces, string(s))
		case 5:
			meta.Written = time.Unix(0, int64(v)).UTC()
		case 6:
			var r RawResource
			if err := eachField(s, func(num protowire.Number, s []byte, _ uint64) error {
				switch num {
				case 1:
					r.Type = string(s)
				case 2:
					r.Name = string(s)
				case 3:
					r.Version = string(s)
				case 4:
					r.Bytes = append([]byte(nil), s...) // nil when empty
				}
				return nil
			}); err != nil {
				return err
			}
			if r.Type == "" || r.Name == "" {
				return fmt.Errorf("a resource of type %q with the name %q: want both", r.Type, r.Name)
			}
			if n := len(out); n > 0 && cmp.Or(cmp.Compare(out[n-1].Type, r.Type), cmp.Compare(out[n-1].Name, r.Name)) >= 0 {
				return fmt.Errorf("%s %q stands twice or out of order", r.Type, r.Name)
			}
			out = append(out, r)
		}
		return nil
	})
	return out, err
}

// eachField walks one level of protobuf wire format. s is the value of a field of bytes, v that of
// a varint. Known fields are told apart by number alone, so each must have its own wire type.
func eachField(b []byte, f func(num protowire.Number, s []byte, v uint64) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var s []byte
		var v uint64
		switch typ {
		case protowire.BytesType:
			s, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
			num = 0 // no field of ours has another wire type
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		if typ == protowire.VarintType != (num == 5) && num != 0 && num <= 6 {
			return fmt.Errorf("field %d has the wrong wire type", num)
		}
		if err := f(num, s, v); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// Snapshot is a configuration from a file: what INLAY_CONFIG names. Immutable once loaded.
type Snapshot struct {
	Path      string
	Meta      Meta
	Resources []RawResource
}

// LoadSnapshot reads a snapshot file. trustDomain and spiffeID are those of this workload, empty
// when it has none or none yet; a snapshot bound to another identity is refused.
func LoadSnapshot(path, trustDomain, spiffeID string) (*Snapshot, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("configuration snapshot: %w: write it with `inlay compile DIR --for SERVICE -o %s`", err, path)
	}
	resources, meta, err := DecodeSnapshot(b)
	if err != nil {
		return nil, fmt.Errorf("configuration snapshot %s: %w: write it anew with `inlay compile DIR --for SERVICE -o %s`", path, err, path)
	}
	if err := meta.bound(trustDomain, spiffeID); err != nil {
		return nil, fmt.Errorf("configuration snapshot %s: %w: compile it for this service", path, err)
	}
	return &Snapshot{Path: path, Meta: meta, Resources: resources}, nil
}

// bound checks a snapshot against the identity that wants it. Empty on either side is no claim.
func (m Meta) bound(trustDomain, spiffeID string) error {
	if m.TrustDomain != "" && trustDomain != "" && m.TrustDomain != trustDomain {
		return fmt.Errorf("it belongs to trust domain %q, this workload to %q", m.TrustDomain, trustDomain)
	}
	if m.SPIFFEID != "" && spiffeID != "" && m.SPIFFEID != spiffeID {
		return fmt.Errorf("it belongs to %s, this workload is %s", m.SPIFFEID, spiffeID)
	}
	return nil
}
