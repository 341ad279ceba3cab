// Package source says where desired state comes from: it reads a directory of YAML files whole
// and watches it for changes. The control plane hands each revision on to config.Parse; the CLI
// reads a directory once with Load.
//
// It never looks inside a file, and it never hands out half of a directory: a revision is every
// file as it was at one moment, or there is none.
package source

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"sort"
)

// File is one file of a revision.
type File struct {
	// Path is relative to the directory, with forward slashes. It is what findings quote.
	Path string
	Data []byte
}

// Revision is all files of one moment, by path. It is a value: never written once handed out.
type Revision struct {
	// ID is a short hash of paths and contents: equal files have equal IDs, on every machine.
	ID    string
	Files []File
}

// NewRevision sorts files by path and computes the ID. It keeps the slice.
func NewRevision(files []File) Revision {
	sort.Slice(files, func(i, j int) bool { return files[i].Path < files[j].Path })
	h := sha256.New()
	var n [8]byte
	for _, f := range files {
		// Lengths go before contents, so that bytes cannot move from one file to the next unseen.
		binary.BigEndian.PutUint64(n[:], uint64(len(f.Path)))
		h.Write(n[:])
		h.Write([]byte(f.Path))
		binary.BigEndian.PutUint64(n[:], uint64(len(f.Data)))
		h.Write(n[:])
		h.Write(f.Data)
	}
	return Revision{ID: hex.EncodeToString(h.Sum(nil))[:12], Files: files}
}
