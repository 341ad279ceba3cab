package controlplane

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/ca"
	"github.com/inlay-mesh/inlay/controlplane/registry"
	"github.com/inlay-mesh/inlay/controlplane/registry/vip"
	"github.com/inlay-mesh/inlay/controlplane/source"
	"github.com/inlay-mesh/inlay/controlplane/store"
)

// disk is the store, or the memory of a control plane without a data directory. It remembers which
// writes fail: a full disk stops nobody, but the status says so.
type disk struct {
	store *store.Store // nil: nothing is remembered
	caDir string
	temp  string // removed by Close
	log   *slog.Logger

	mu       sync.Mutex
	failures map[string]error // by what is written
	changed  func()           // called when failures change; nil for nobody
	closed   bool
}

func newDisk(cfg Config) (*disk, error) {
	d := &disk{log: cfg.Log, failures: make(map[string]error)}
	if cfg.DataDir == "" {
		temp, err := os.MkdirTemp("", "inlay-ca-")
		if err != nil {
			return nil, fmt.Errorf("directory for the authority's key: %w", err)
		}
		d.temp, d.caDir = temp, filepath.Join(temp, "ca")
		return d, nil
	}
	s, err := store.Open(store.Config{Dir: cfg.DataDir, Clock: cfg.Clock, Log: cfg.Log})
	if err != nil {
		return nil, err
	}
	d.store, d.caDir = s, filepath.Join(cfg.DataDir, "ca")
	return d, nil
}

// Close may be called twice.
func (d *disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	if d.temp != "" {
		return os.RemoveAll(d.temp)
	}
	return d.store.Close()
}

// leases, certs and virtual are nil interfaces when nothing is remembered.
func (d *disk) leases() registry.Leases {
	if d.store == nil {
		return nil
	}
	return d
}

func (d *disk) certs() ca.Log {
	if d.store == nil {
		return nil
	}
	return d
}

func (d *disk) virtual() vip.Store {
	if d.store == nil {
		return nil
	}
	return d
}

func (d *disk) note(what string, err error) error {
	d.mu.Lock()
	before := d.failures[what]
	if err == nil {
		delete(d.failures, what)
	} else {
		d.failures[what] = err
	}
	changed := d.changed
	d.mu.Unlock()
	if (err == nil) != (before == nil) && changed != nil {
		changed()
	}
	return err
}

// tell has f called when failing returns something else.
func (d *disk) tell(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changed = f
}

// failing returns what cannot be written at present.
func (d *disk) failing() map[string]error {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make(map[string]error, len(d.failures))
	for what, err := range d.failures {
		out[what] = err
	}
	return out
}

func (d *disk) Instances() ([]registry.Instance, error) { return d.store.Instances() }

func (d *disk) WriteInstances(put []registry.Instance, del []string) error {
	return d.note("instances", d.store.WriteInstances(put, del))
}

func (d *disk) VirtualIndexes() ([]vip.Given, error) { return d.store.VirtualIndexes() }

func (d *disk) WriteVirtualIndexes(put []vip.Given, del []vip.Service) error {
	return d.note("virtual addresses", d.store.WriteVirtualIndexes(put, del))
}

func (d *disk) Certs() ([]ca.Cert, error) { return d.store.Certs() }

func (d *disk) RecordCert(c ca.Cert) error { return d.note("certificates", d.store.RecordCert(c)) }

func (d *disk) saveRevision(rev source.Revision, at time.Time) error {
	if d.store == nil {
		return nil
	}
	r := store.Revision{ID: rev.ID, Time: at}
	for _, f := range rev.Files {
		r.Files = append(r.Files, store.File(f))
	}
	return d.note("revisions", d.store.SaveRevision(r))
}

// timeOf returns when a revision was first accepted, when it is the newest remembered one.
func (d *disk) timeOf(id string, now time.Time) time.Time {
	if d.store == nil {
		return now
	}
	if last, ok, err := d.store.LastRevision(); err == nil && ok && last.ID == id {
		return last.Time
	}
	return now
}

// revisions returns what is remembered, newest first; nothing when it cannot be read.
func (d *disk) revisions() []source.Revision {
	if d.store == nil {
		return nil
	}
	stored, err := d.store.Revisions()
	if err != nil {
		d.log.Warn("remembered revisions cannot be read", "err", err)
		return nil
	}
	var out []source.Revision
	for _, r := range stored {
		files := make([]source.File, 0, len(r.Files))
		for _, f := range r.Files {
			files = append(files, source.File(f))
		}
		out = append(out, source.NewRevision(files))
	}
	return out
}
