package store

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"
)

// The format on disk: a bbolt file whose bucket "meta" holds the magic and the version, beside one
// bucket for each kind of thing. Values are JSON of the record types in this package, so that a
// field added with a useful zero needs no new version.
//
//	version 0  revisions by id, files as a map of path to text; no certificates
//	version 1  revisions by number, oldest first, files as a list; certificates by expiry
//	version 2  numbers of virtual addresses by service; instances may have no ports
const schemaVersion = 2

const magic = "inlay store"

var (
	metaBucket      = []byte("meta")
	revisionsBucket = []byte("revisions")
	instancesBucket = []byte("instances")
	certsBucket     = []byte("certs")
	addressesBucket = []byte("addresses")

	magicKey   = []byte("magic")
	versionKey = []byte("version")
)

// migrations[i] brings version i to i+1, inside the transaction that also writes the number.
var migrations = [schemaVersion]func(*bbolt.Tx) error{
	0: orderRevisions,
	1: addAddresses,
}

// bringForward checks magic and version, makes an empty store, or migrates an older one. All of
// it is one transaction: a crash on the way leaves the older version whole.
func (s *Store) bringForward() error {
	path := s.db.Path()
	return s.update(func(tx *bbolt.Tx) error {
		meta := tx.Bucket(metaBucket)
		if meta == nil {
			if name, _ := tx.Cursor().First(); name != nil {
				return notOurs(path, fmt.Errorf("it has a bucket %q and no %q", name, metaBucket))
			}
			return create(tx)
		}
		if got := meta.Get(magicKey); !bytes.Equal(got, []byte(magic)) {
			return notOurs(path, fmt.Errorf("magic %q: want %q", got, magic))
		}
		raw := meta.Get(versionKey)
		if len(raw) != 8 {
			return notOurs(path, fmt.Errorf("version of %d bytes: want 8", len(raw)))
		}
		version := binary.BigEndian.Uint64(raw)
		if version > schemaVersion {
			return fmt.Errorf("%s has format version %d, %w of inlay; this one reads up to %d: start that newer inlay again, or pass another directory with --data DIR",
				path, version, ErrNewer, schemaVersion)
		}
		if version == schemaVersion {
			return nil
		}
		for v := version; v < schemaVersion; v++ {
			if err := migrations[v](tx); err != nil {
				return fmt.Errorf("%s: migration from version %d to %d: %w", path, v, v+1, err)
			}
		}
		s.cfg.Log.Info("data directory brought forward", "dir", s.cfg.Dir, "from", version, "to", schemaVersion)
		return putVersion(meta, schemaVersion)
	})
}

func create(tx *bbolt.Tx) error {
	for _, name := range [][]byte{metaBucket, revisionsBucket, instancesBucket, certsBucket, addressesBucket} {
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	meta := tx.Bucket(metaBucket)
	if err := meta.Put(magicKey, []byte(magic)); err != nil {
		return err
	}
	return putVersion(meta, schemaVersion)
}

func putVersion(meta *bbolt.Bucket, v uint64) error {
	return meta.Put(versionKey, binary.BigEndian.AppendUint64(nil, v))
}

// addAddresses is the step from version 1 to 2. An older inlay would serve instances without ports
// wrongly and let services lose their addresses, so that it must not open the file again.
func addAddresses(tx *bbolt.Tx) error {
	_, err := tx.CreateBucketIfNotExists(addressesBucket)
	return err
}

// orderRevisions is the step from version 0 to 1.
func orderRevisions(tx *bbolt.Tx) error {
	type revision0 struct {
		Time  time.Time         `json:"time"`
		Files map[string]string `json:"files"`
	}
	var all []revisionRecord
	if old := tx.Bucket(revisionsBucket); old != nil {
		err := old.ForEach(func(k, v []byte) error {
			var r revision0
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("revision %q: %w", k, err)
			}
			rec := revisionRecord{ID: string(k), Time: r.Time}
			for path, text := range r.Files {
				rec.Files = append(rec.Files, fileRecord{Path: path, Data: []byte(text)})
			}
			slices.SortFunc(rec.Files, func(a, b fileRecord) int { return cmp.Compare(a.Path, b.Path) })
			all = append(all, rec)
			return nil
		})
		if err != nil {
			return err
		}
		if err := tx.DeleteBucket(revisionsBucket); err != nil {
			return err
		}
	}
	slices.SortFunc(all, func(a, b revisionRecord) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.ID, b.ID))
	})
	revisions, err := tx.CreateBucket(revisionsBucket)
	if err != nil {
		return err
	}
	for _, rec := range all {
		if err := appendRevision(revisions, rec); err != nil {
			return err
		}
	}
	for _, name := range [][]byte{instancesBucket, certsBucket} {
		if _, err := tx.CreateBucketIfNotExists(name); err != nil {
			return err
		}
	}
	return nil
}
