// Package store keeps on one disk what a control plane must remember over a restart: the last
// revisions of the configuration, the live instances, the virtual addresses of services, and the
// certificates that the CA signed. controlplane opens it and hands it to registry, vip and ca
// through the interfaces they declare.
//
// It never holds a private key (the CA keeps its own key file), and it never decides what is
// served: a caller whose write fails goes on with what it has in memory.
package store

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

const (
	fileName = "inlay.db"
	pidName  = "inlay.pid"
	// lockWait bounds how long Open waits for another process: long enough for one that is just
	// ending, short enough for a person.
	lockWait = time.Second
)

// Clock tells the time.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// Config is what Open needs.
type Config struct {
	// Dir is the data directory; Open makes it, with mode 0700, when it is missing.
	Dir string
	// KeepRevisions is how many revisions stay. Zero means 20.
	KeepRevisions int
	Clock         Clock        // nil means the real one
	Log           *slog.Logger // nil discards
}

// Store is an open data directory. It is safe for concurrent use; every write is one transaction
// that is on the disk when the method returns.
type Store struct {
	cfg Config
	db  *bbolt.DB
}

// Open opens the data directory, makes it when missing, and brings an older format forward. It
// waits at most a second for another process that holds the directory. The errors say what to do:
// a directory in use names the process, an unwritable one another choice, a newer format the way out.
func Open(cfg Config) (*Store, error) {
	if cfg.Dir == "" {
		return nil, errors.New("data directory: empty name: want a path (--data DIR)")
	}
	if cfg.KeepRevisions == 0 {
		cfg.KeepRevisions = 20
	}
	if cfg.Clock == nil {
		cfg.Clock = systemClock{}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, explain(cfg.Dir, "make", err)
	}
	path := filepath.Join(cfg.Dir, fileName)
	if err := checkFile(path); err != nil {
		return nil, err
	}
	var db *bbolt.DB
	err := guarded(func() (err error) {
		db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockWait})
		return err
	})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, inUse(cfg.Dir)
	}
	if err != nil {
		if errors.Is(err, berrors.ErrInvalid) || errors.Is(err, berrors.ErrVersionMismatch) ||
			errors.Is(err, berrors.ErrChecksum) || errors.Is(err, errDamaged) {
			return nil, notOurs(path, err)
		}
		return nil, explain(cfg.Dir, "open", err)
	}
	s := &Store{cfg: cfg, db: db}
	if err := s.bringForward(); err != nil {
		_ = db.Close()
		return nil, err
	}
	// Only for the text of inUse: the lock itself is on the database file.
	if err := os.WriteFile(filepath.Join(cfg.Dir, pidName), []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600); err != nil {
		_ = db.Close()
		return nil, explain(cfg.Dir, "write to", err)
	}
	return s, nil
}

// Close releases the directory. It may be called twice.
func (s *Store) Close() error {
	// The pid file goes first, while the lock still keeps others from writing theirs.
	_ = os.Remove(filepath.Join(s.cfg.Dir, pidName))
	if err := s.db.Close(); err != nil {
		return explain(s.cfg.Dir, "close", err)
	}
	return nil
}

// Dir returns the data directory.
func (s *Store) Dir() string { return s.cfg.Dir }

// update runs f in one write transaction and says what to do when the disk refuses.
func (s *Store) update(f func(*bbolt.Tx) error) error {
	return s.in("write to", func() error { return s.db.Update(f) })
}

func (s *Store) view(f func(*bbolt.Tx) error) error {
	return s.in("read", func() error { return s.db.View(f) })
}

func (s *Store) in(doing string, f func() error) error {
	err := guarded(f)
	if errors.Is(err, errDamaged) {
		return notOurs(s.db.Path(), err)
	}
	if err != nil {
		return explain(s.cfg.Dir, doing, err)
	}
	return nil
}

// errDamaged stands for a panic of the database over bytes that it did not write.
var errDamaged = errors.New("damaged pages")

// plausible refuses a key or value whose length was damaged before anything walks over it.
func plausible(tx *bbolt.Tx, k, v []byte) error {
	if int64(len(k)) > bbolt.MaxKeySize || int64(len(v)) > tx.Size() {
		return fmt.Errorf("%w: a key of %d bytes with a value of %d", errDamaged, len(k), len(v))
	}
	return nil
}

// guarded runs f and turns its panic into errDamaged: bbolt asserts the form of its pages, and a
// page beyond the end of a file cut short faults in the map.
func guarded(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	return f()
}

// checkFile refuses what is not a database before bbolt maps it: a file cut short would fault.
func checkFile(path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return explain(filepath.Dir(path), "open", err)
	}
	if !info.Mode().IsRegular() {
		return notOurs(path, fmt.Errorf("it is a %s, not a file", info.Mode().Type()))
	}
	// bbolt writes four pages at once when it makes a database, so a smaller one was cut.
	if size := info.Size(); size > 0 && size < 4*4096 {
		return notOurs(path, fmt.Errorf("it holds %d bytes", size))
	}
	return nil
}

// inUse names the process that holds the directory, as far as its pid file tells.
func inUse(dir string) error {
	holder := "another process"
	if b, err := os.ReadFile(filepath.Join(dir, pidName)); err == nil {
		if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			holder = fmt.Sprintf("pid %d", pid)
		}
	}
	return fmt.Errorf("the data directory %s is %w by %s: stop it, or pass another one with --data DIR", dir, ErrInUse, holder)
}
