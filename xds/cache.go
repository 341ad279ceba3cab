package xds

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// CacheConfig says where the last known good is kept and for whom.
type CacheConfig struct {
	// Path of the file. Its directory is made when needed, for the owner only.
	Path string
	// TrustDomain and SPIFFEID of this workload. A file of another identity is refused. Empty
	// when the workload has no identity; such a cache only reads files that are bound to none.
	TrustDomain, SPIFFEID string
	// Debounce is how long changes are gathered before they are written; zero means 1 s.
	Debounce time.Duration
	Log      *slog.Logger // nil discards
}

// Cache is the last known good configuration in one file: 0600, owner checked, checksummed, bound
// to one identity and replaced atomically. A Client fills it; it is safe for concurrent use. A
// directory that cannot be written costs one warning and nothing else.
type Cache struct {
	cfg CacheConfig

	read    time.Time     // Meta.Written of the file that was read; zero for none
	changed chan struct{} // something is to be saved; capacity 1

	mu        sync.Mutex
	meta      Meta
	resources map[key]RawResource
	gen       uint64 // counts changes
	saved     uint64 // gen of the last file
	warned    bool
}

// OpenCache reads the file at cfg.Path; that there is none yet is not an error. A file that is not
// ours (owner, identity, format, checksum) is refused with an error that names the fault and the
// remedy, and is not touched; serving without a cache is then the caller's choice.
func OpenCache(cfg CacheConfig) (*Cache, error) {
	if cfg.Path == "" {
		return nil, errors.New("cache: path is empty: want a file")
	}
	if cfg.Debounce == 0 {
		cfg.Debounce = time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Cache{cfg: cfg, changed: make(chan struct{}, 1), resources: map[key]RawResource{}, meta: Meta{TrustDomain: cfg.TrustDomain, SPIFFEID: cfg.SPIFFEID}}
	b, err := readOwned(cfg.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	resources, meta, err := DecodeSnapshot(b)
	if err != nil {
		return nil, fmt.Errorf("cache %s: %w: remove the file; it is written anew", cfg.Path, err)
	}
	if meta.TrustDomain != cfg.TrustDomain || meta.SPIFFEID != cfg.SPIFFEID {
		return nil, fmt.Errorf("cache %s belongs to %s, this workload is %s: remove the file, or give each service its own INLAY_STATE_DIR",
			cfg.Path, identityText(meta.TrustDomain, meta.SPIFFEID), identityText(cfg.TrustDomain, cfg.SPIFFEID))
	}
	c.meta, c.read = meta, meta.Written
	for _, r := range resources {
		c.resources[key{r.Type, r.Name}] = r
	}
	return c, nil
}

func identityText(trustDomain, id string) string {
	if id == "" {
		return fmt.Sprintf("a workload without identity in trust domain %q", trustDomain)
	}
	return fmt.Sprintf("%s (trust domain %q)", id, trustDomain)
}

// Meta is what the file said, or what will be written.
func (c *Cache) Meta() Meta {
	c.mu.Lock()
	defer c.mu.Unlock()
	m := c.meta
	m.Namespaces = slices.Clone(m.Namespaces)
	return m
}

// SetNamespaces keeps the namespaces that the control plane announced.
func (c *Cache) SetNamespaces(names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Equal(c.meta.Namespaces, names) {
		c.meta.Namespaces = slices.Clone(names)
		c.touch()
	}
}

// loaded is when the file that was read had been written; zero when there was none.
func (c *Cache) loaded() time.Time { return c.read }

func (c *Cache) get(k key) (RawResource, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.resources[k]
	return r, ok
}

// Resources lists what is kept of one type, in no order. Bytes are shared: read only.
func (c *Cache) Resources(typeURL string) []RawResource {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []RawResource
	for k, r := range c.resources {
		if k.Type == typeURL {
			out = append(out, r)
		}
	}
	return out
}

// put keeps a resource.
func (c *Cache) put(r RawResource) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := key{r.Type, r.Name}
	if old, ok := c.resources[k]; ok && old.Version == r.Version && string(old.Bytes) == string(r.Bytes) {
		return
	}
	c.resources[k] = r
	c.touch()
}

func (c *Cache) remove(k key) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.resources[k]; ok {
		delete(c.resources, k)
		c.touch()
	}
}

// touch notes a change. The lock is held.
func (c *Cache) touch() {
	c.gen++
	signal(c.changed)
}

func (c *Cache) dirty() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gen != c.saved
}

// save writes the file if something changed since the last time. A failure is logged once, until
// it works again.
func (c *Cache) save(now time.Time) {
	c.mu.Lock()
	if c.gen == c.saved {
		c.mu.Unlock()
		return
	}
	gen := c.gen
	c.meta.Written = now.UTC()
	list := make([]RawResource, 0, len(c.resources))
	for _, r := range c.resources {
		list = append(list, r)
	}
	meta := c.meta
	c.mu.Unlock()

	err := replaceFile(c.cfg.Path, EncodeSnapshot(list, meta))
	c.mu.Lock()
	defer c.mu.Unlock()
	c.saved = gen // also on failure: the next change tries again; to try this one again and again is no use
	switch {
	case err == nil:
		c.warned = false
	case !c.warned:
		c.warned = true
		c.cfg.Log.Warn("last known good configuration cannot be saved; serving goes on, a cold start without control plane will not",
			"path", c.cfg.Path, "err", err)
	}
}

// WriteSnapshot writes a snapshot file for the owner only, atomically: `inlay compile` uses it.
func WriteSnapshot(path string, resources []RawResource, meta Meta) error {
	return replaceFile(path, EncodeSnapshot(resources, meta))
}

// replaceFile writes path through a temporary file beside it, so that a reader and a crash see the
// old contents or the new, never a part.
func replaceFile(path string, b []byte) (err error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, filepath.Base(path)+".*.tmp") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(b); err != nil {
		f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
