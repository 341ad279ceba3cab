package xds

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/inlay-mesh/inlay/xds/ads"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
	"github.com/inlay-mesh/inlay/xds/resource"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// ErrNotExist says that the control plane has no such resource, by its word or by its silence
// (gRFC A57).
var ErrNotExist = errors.New("resource does not exist")

// Clock tells time and runs timers; nil in a Config means the real one.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

// Resource is what a watcher is told.
type Resource struct {
	// Decoded is nil when Err is not. It is shared: read only.
	Decoded *resource.Decoded
	Version string
	// Err says why there is no value: ErrNotExist is in its chain, or the only one ever sent was
	// rejected. A rejected update of a good value is not told; Status shows it.
	Err error
	// Cached says that the value is from disk and no server has sent it in this process.
	Cached bool
}

// Watcher takes the news of one resource. Changed is called in order and one at a time, from the
// goroutine of Run that serves all watchers: it must not block. News that came while an earlier
// call was under way are told once, the newest.
type Watcher interface{ Changed(Resource) }

// WatcherFunc is a function as a Watcher.
type WatcherFunc func(Resource)

// Changed calls f.
func (f WatcherFunc) Changed(r Resource) { f(r) }

// Config of a Client.
type Config struct {
	// Bootstrap says where the servers are and who the node is. Required; its Servers may be empty
	// when there is a Snapshot or a Cache.
	Bootstrap *bootstrap.Bootstrap
	// Dial makes a channel to a server with the credentials its Creds ask for; the Client closes
	// it. It is called for each attempt and should set keepalive parameters. Required with servers.
	Dial func(ctx context.Context, server bootstrap.Server) (*grpc.ClientConn, error)
	// UserAgent and its version go into the node, as do the features this client announces.
	UserAgent, UserAgentVersion string
	ClientFeatures              []string
	// Decoders adds types beyond those of package resource, by type URL.
	Decoders map[string]func(value []byte) (resource.Decoded, error)
	Cache    *Cache    // last known good; nil means none yet, see Attach
	Snapshot *Snapshot // configuration from a file; nil means none
	// Linger is how long an unwatched resource stays subscribed; zero means 15 s.
	Linger time.Duration
	// ResourceTimeout is how long a connected server has to answer for a name; zero means 15 s.
	ResourceTimeout time.Duration
	ConnectTimeout  time.Duration  // of one attempt; zero means 10 s
	Log             *slog.Logger   // nil discards
	Clock           Clock          // nil means the real one
	Rand            func() float64 // in [0,1), for jitter; nil means math/rand/v2
}

// key is a resource by type URL and name.
type key struct{ Type, Name string }

// Client watches resources by name, or all of a type, over one ADS stream. It is safe for concurrent use.
type Client struct {
	cfg    Config
	stream *ads.Stream   // nil without servers
	wake   chan struct{} // there is something for pump; capacity 1
	stored chan struct{} // closed when cache is set

	inMu  sync.Mutex
	inbox []ads.Update // from the stream, which holds its lock while it delivers

	mu       sync.Mutex
	running  bool
	entries  map[key]*entry
	queue    []*watch               // those with news, in order
	all      map[string]*everything // by type URL
	allQueue []*allWatch            // those with news, in order
	cache    *Cache
	file     map[key]RawResource // of the snapshot
}

// entry is one watched resource.
type entry struct {
	watches []*watch
	linger  *linger // set while nobody watches
	// covered says that it is here because everything of the type is watched, not by its name.
	covered bool

	value   *resource.Decoded
	version string
	cached  bool
	err     error // why there is no value; nil with value nil: not decided
	bytes   []byte
	updated time.Time

	rejected        string // why the newest bytes were not taken; empty once a good one came
	rejectedVersion string
}

type linger struct{ stop func() bool }

type watch struct {
	w         Watcher
	news      *Resource // not told yet
	cancelled bool
}

// New checks cfg and returns a client at rest; nothing runs until Run.
func New(cfg Config) (*Client, error) {
	switch {
	case cfg.Bootstrap == nil:
		return nil, errors.New("xds: Bootstrap is nil: want one from bootstrap.Load")
	case len(cfg.Bootstrap.Servers) > 0 && cfg.Dial == nil:
		return nil, errors.New("xds: Dial is nil: want one for the servers of the bootstrap")
	case len(cfg.Bootstrap.Servers) == 0 && cfg.Snapshot == nil && cfg.Cache == nil:
		return nil, fmt.Errorf("xds: no server, no snapshot and no cache: %w", bootstrap.ErrNotFound)
	}
	if cfg.Linger == 0 {
		cfg.Linger = 15 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Clock == nil {
		cfg.Clock = realClock{}
	}
	c := &Client{cfg: cfg, wake: make(chan struct{}, 1), stored: make(chan struct{}),
		entries: map[key]*entry{}, all: map[string]*everything{}, cache: cfg.Cache, file: map[key]RawResource{}}
	if cfg.Cache != nil {
		close(c.stored)
	}
	if cfg.Snapshot != nil {
		for _, r := range cfg.Snapshot.Resources {
			c.file[key{r.Type, r.Name}] = r
		}
	}
	if len(cfg.Bootstrap.Servers) == 0 {
		return c, nil
	}
	n, err := node(cfg)
	if err != nil {
		return nil, fmt.Errorf("xds: node: %w", err)
	}
	var names []string
	for _, s := range cfg.Bootstrap.Servers {
		names = append(names, s.URI)
	}
	c.stream, err = ads.New(ads.Config{
		Servers: names,
		Dial: func(ctx context.Context, i int) (*grpc.ClientConn, error) {
			return cfg.Dial(ctx, cfg.Bootstrap.Servers[i])
		},
		Node: n, Check: c.check, Deliver: c.deliver,
		ResourceTimeout: cfg.ResourceTimeout, ConnectTimeout: cfg.ConnectTimeout,
		Log: cfg.Log, Clock: cfg.Clock, Rand: cfg.Rand,
	})
	return c, err
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }
func (realClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}

func node(cfg Config) (*xdspb.Node, error) {
	b := cfg.Bootstrap.Node
	n := &xdspb.Node{Id: b.ID, Cluster: b.Cluster, UserAgentName: cfg.UserAgent, ClientFeatures: cfg.ClientFeatures}
	if n.Id == "" {
		n.Id = "inlay~" + crand.Text() // servers key what they know of a client by its id
	}
	if cfg.UserAgentVersion != "" {
		n.UserAgentVersionType = &xdspb.Node_UserAgentVersion{UserAgentVersion: cfg.UserAgentVersion}
	}
	if b.Locality != (bootstrap.Locality{}) {
		n.Locality = &xdspb.Locality{Region: b.Locality.Region, Zone: b.Locality.Zone, SubZone: b.Locality.SubZone}
	}
	if len(b.Metadata) > 0 {
		var err error
		if n.Metadata, err = structpb.NewStruct(b.Metadata); err != nil {
			return nil, fmt.Errorf("metadata: %w", err)
		}
	}
	return n, nil
}

// Run serves watchers and keeps the stream up until ctx is done. It returns when every goroutine
// it started has ended and the cache is written. It may be called once.
func (c *Client) Run(ctx context.Context) error {
	c.mu.Lock()
	if c.running {
		c.mu.Unlock()
		return errors.New("xds: Run was called twice")
	}
	c.running = true
	c.mu.Unlock()

	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { c.saveLoop(ctx) })
	if c.stream != nil {
		wg.Go(func() {
			if err := c.stream.Run(ctx); err != nil {
				c.cfg.Log.ErrorContext(ctx, "control plane stream", "err", err)
			}
		})
	}
	for {
		select {
		case <-c.wake:
			c.pump()
		case <-ctx.Done():
			c.mu.Lock()
			for _, e := range c.entries {
				if e.linger != nil {
					e.linger.stop()
				}
			}
			c.mu.Unlock()
			return nil
		}
	}
}

// Watch tells w of a resource from now on: at once what is known, later what changes. Several
// watches of one name share one subscription. After cancel returns, no call to w starts; one that
// has started may be under way. cancel may be called more than once and from within Changed.
// Watch never blocks and never calls w itself.
func (c *Client) Watch(typeURL, name string, w Watcher) (cancel func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := key{typeURL, name}
	x := &watch{w: w}
	e := c.entries[k]
	if e == nil {
		e = &entry{}
		c.entries[k] = e
		c.start(k, e)
	}
	if e.covered {
		e.covered = false
		if c.stream != nil {
			c.stream.Subscribe(ads.Name(k), e.value != nil, e.version)
		}
	}
	if e.linger != nil {
		e.linger.stop()
		e.linger = nil
	}
	e.watches = append(e.watches, x)
	if e.value != nil || e.err != nil {
		c.tell(x, e)
	}
	return func() { c.cancel(k, e, x) }
}

// start gives a new entry what is known without asking, and asks. The lock is held.
func (c *Client) start(k key, e *entry) {
	if !c.decodes(k.Type) {
		e.err = fmt.Errorf("%s %q: this client has no decoder for the type", k.Type, k.Name)
		return
	}
	if k.Name == "" || k.Name == "*" {
		// xDS protocol: the name "*" is a wildcard, and no name at all may be read as one.
		e.err = fmt.Errorf("%s %q: want the name of one resource: %w", resource.Kind(k.Type), k.Name, ErrNotExist)
		return
	}
	raw, found := c.file[k]
	fromFile := found
	if !found && c.cache != nil {
		raw, found = c.cache.get(k)
	}
	if found {
		c.load(k, e, raw, !fromFile || c.stream != nil)
	}
	if c.stream != nil {
		c.stream.Subscribe(ads.Name(k), e.value != nil, e.version)
		return
	}
	if e.value == nil && e.err == nil {
		e.err = fmt.Errorf("%s %q is not in the configuration at hand, and there is no control plane to ask: %w", resource.Kind(k.Type), k.Name, ErrNotExist)
	}
}

// load takes a stored resource. The lock is held.
func (c *Client) load(k key, e *entry, raw RawResource, cached bool) {
	d, err := c.decode(k.Type, raw.Bytes)
	if err == nil && d.Name != k.Name {
		err = fmt.Errorf("it is named %q", d.Name)
	}
	if err != nil {
		c.cfg.Log.Warn("stored resource is not usable, it is left out", "type", k.Type, "name", k.Name, "err", err)
		return
	}
	e.value, e.version, e.cached, e.bytes, e.updated = &d, raw.Version, cached, raw.Bytes, c.cfg.Clock.Now()
}

func (c *Client) cancel(k key, e *entry, x *watch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if x.cancelled {
		return
	}
	x.cancelled = true
	e.watches = slices.DeleteFunc(e.watches, func(other *watch) bool { return other == x })
	if len(e.watches) > 0 {
		return
	}
	l := &linger{}
	e.linger = l
	l.stop = c.cfg.Clock.AfterFunc(c.cfg.Linger, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if e.linger != l {
			return // watched again while the timer fired
		}
		if e.covered = c.all[k.Type] != nil && e.value != nil; !e.covered {
			delete(c.entries, k)
		}
		e.linger = nil
		if c.stream != nil {
			c.stream.Unsubscribe(ads.Name(k))
		}
	})
}

// Attach gives the client its cache when the identity it is bound to was not known at New. What is
// watched and has no value yet takes the stored one. Only the first cache is taken.
func (c *Client) Attach(cache *Cache) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cache != nil || cache == nil {
		return
	}
	c.cache = cache
	close(c.stored)
	for k, e := range c.entries {
		if e.value != nil {
			if e.bytes != nil && !e.cached {
				cache.put(RawResource{k.Type, k.Name, e.version, e.bytes})
			}
			continue
		}
		raw, ok := cache.get(k)
		if !ok || errors.Is(e.err, ErrNotExist) && c.stream != nil {
			continue
		}
		if c.load(k, e, raw, true); e.value != nil {
			e.err = nil
			c.tellAll(k, e)
		}
	}
	for typeURL, a := range c.all {
		if a.synced {
			continue // the server's word on what there is
		}
		known := len(c.entries)
		c.loadAll(typeURL)
		if len(c.entries) == known {
			continue
		}
		held := map[string]string{}
		for k, e := range c.entries {
			if k.Type != typeURL || !e.covered || !e.cached {
				continue
			}
			held[k.Name] = e.version
			for _, x := range a.watches {
				c.tellOf(x, k.Name, e)
			}
		}
		if c.stream != nil {
			c.stream.Hold(typeURL, held)
		}
	}
}

func (c *Client) decodes(typeURL string) bool {
	switch typeURL {
	case resource.ListenerType, resource.RouteType, resource.ClusterType, resource.EndpointsType:
		return true
	}
	return c.cfg.Decoders[typeURL] != nil
}

func (c *Client) decode(typeURL string, value []byte) (resource.Decoded, error) {
	if f := c.cfg.Decoders[typeURL]; f != nil {
		return f(value)
	}
	return resource.Decode(typeURL, value)
}

func (c *Client) check(typeURL string, value []byte) (string, any, error) {
	d, err := c.decode(typeURL, value)
	if err != nil {
		return d.Name, nil, err
	}
	return d.Name, &d, nil
}
