package store

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
)

// Revision is one accepted set of configuration files.
type Revision struct {
	// ID is that of the source: a hash of the contents.
	ID    string
	Time  time.Time
	Files []File
}

// File is one file of a revision.
type File struct {
	Path string // relative to the configuration directory
	Data []byte
}

type revisionRecord struct {
	ID    string       `json:"id"`
	Time  time.Time    `json:"time"`
	Files []fileRecord `json:"files"`
}

type fileRecord struct {
	Path string `json:"path"`
	Data []byte `json:"data"`
}

// SaveRevision makes r the newest revision and drops the oldest beyond the limit. The id that is
// newest already is not written again: a restart repeats it.
func (s *Store) SaveRevision(r Revision) error {
	rec := revisionRecord{ID: r.ID, Time: r.Time.UTC()}
	for _, f := range r.Files {
		rec.Files = append(rec.Files, fileRecord(f))
	}
	return s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(revisionsBucket)
		if _, last := b.Cursor().Last(); last != nil {
			var newest revisionRecord
			if json.Unmarshal(last, &newest) == nil && newest.ID == rec.ID {
				return nil
			}
		}
		if err := appendRevision(b, rec); err != nil {
			return err
		}
		c := b.Cursor()
		extra := -s.cfg.KeepRevisions
		for k, _ := c.First(); k != nil; k, _ = c.Next() {
			extra++
		}
		for k, _ := c.First(); k != nil && extra > 0; k, _ = c.First() {
			if err := c.Delete(); err != nil {
				return err
			}
			extra--
		}
		return nil
	})
}

// Revisions returns what is kept, newest first.
func (s *Store) Revisions() ([]Revision, error) {
	return s.revisions(-1)
}

// LastRevision returns the newest revision; ok is false when there is none.
func (s *Store) LastRevision() (r Revision, ok bool, err error) {
	all, err := s.revisions(1)
	if err != nil || len(all) == 0 {
		return Revision{}, false, err
	}
	return all[0], true, nil
}

// revisions reads up to limit of them; a negative limit reads all.
func (s *Store) revisions(limit int) ([]Revision, error) {
	var out []Revision
	err := s.view(func(tx *bbolt.Tx) error {
		c := tx.Bucket(revisionsBucket).Cursor()
		for k, v := c.Last(); k != nil && len(out) != limit; k, v = c.Prev() {
			if err := plausible(tx, k, v); err != nil {
				return err
			}
			var rec revisionRecord
			if err := json.Unmarshal(v, &rec); err != nil {
				return fmt.Errorf("revision %x: %w", k, err)
			}
			r := Revision{ID: rec.ID, Time: rec.Time}
			for _, f := range rec.Files {
				r.Files = append(r.Files, File(f))
			}
			out = append(out, r)
		}
		return nil
	})
	return out, err
}

func appendRevision(b *bbolt.Bucket, rec revisionRecord) error {
	n, err := b.NextSequence()
	if err != nil {
		return err
	}
	v, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return b.Put(binary.BigEndian.AppendUint64(nil, n), v)
}
