package xds

import (
	"fmt"
	"slices"

	"github.com/inlay-mesh/inlay/xds/ads"
)

// wildcard is the name under which ads tells how a subscription to everything of a type stands.
const wildcard = "*"

// AllWatcher takes the news of every resource of a type. Its methods are called in order and one at
// a time, from the goroutine of Run that serves all watchers: they must not block. Of one resource,
// news that came while an earlier call was under way are told once, the newest.
type AllWatcher interface {
	// Changed tells of one resource. ErrNotExist in the chain of r.Err says that it is gone;
	// another error that the only bytes ever sent were rejected.
	Changed(name string, r Resource)
	// Synced says, with nil, that all that the server had when it was asked has been told, so that
	// whatever else the watcher remembers from an earlier life is gone: once after the start, and
	// again after each reconnection. Without any server it follows the contents of the snapshot. An
	// error says that the server cannot answer for all (it speaks state of the world only); what
	// was told before holds.
	Synced(err error)
}

// everything is a wildcard subscription to one type.
type everything struct {
	watches []*allWatch
	synced  bool
	err     error
}

type allWatch struct {
	w         AllWatcher
	queued    bool
	news      map[string]Resource // not told yet
	order     []string            // of news
	synced    bool                // not told yet
	syncedErr error
	cancelled bool
}

// WatchAll tells w of every resource of a type from now on: at once what is known, later what
// appears, changes and goes. Several such watches of a type share one subscription, and it ends with
// the last of them. After cancel returns, no call to w starts; one that has started may be under
// way. cancel may be called more than once and from within w. WatchAll never blocks and never calls w
// itself.
//
// A change among n resources costs the same whatever n is, but for the file of the cache, which is
// written whole a while after a change.
func (c *Client) WatchAll(typeURL string, w AllWatcher) (cancel func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	x := &allWatch{w: w, news: map[string]Resource{}}
	a := c.all[typeURL]
	if a == nil {
		a = &everything{}
		c.all[typeURL] = a
		c.startAll(typeURL, a)
	}
	a.watches = append(a.watches, x)
	for k, e := range c.entries {
		if k.Type == typeURL && (e.value != nil || e.err != nil) {
			c.tellOf(x, k.Name, e)
		}
	}
	if a.synced || a.err != nil {
		c.tellSynced(x, a)
	}
	return func() { c.cancelAll(typeURL, a, x) }
}

// startAll gives a new subscription what is known without asking, and asks. The lock is held.
func (c *Client) startAll(typeURL string, a *everything) {
	if !c.decodes(typeURL) {
		a.err = fmt.Errorf("%s: this client has no decoder for the type", typeURL)
		return
	}
	for k, raw := range c.file {
		if k.Type == typeURL {
			c.loadCovered(k, raw, c.stream != nil)
		}
	}
	c.loadAll(typeURL)
	if c.stream == nil {
		a.synced = true
		return
	}
	held := map[string]string{}
	for k, e := range c.entries {
		if k.Type == typeURL && e.covered {
			held[k.Name] = e.version
		}
	}
	c.stream.SubscribeAll(typeURL, held)
}

// loadAll takes what the cache holds of a type and nothing better is known of. The lock is held.
func (c *Client) loadAll(typeURL string) {
	if c.cache == nil {
		return
	}
	for _, raw := range c.cache.Resources(typeURL) {
		c.loadCovered(key{raw.Type, raw.Name}, raw, true)
	}
}

func (c *Client) loadCovered(k key, raw RawResource, cached bool) {
	if c.entries[k] != nil {
		return
	}
	e := &entry{covered: true}
	if c.load(k, e, raw, cached); e.value != nil {
		c.entries[k] = e
	}
}

func (c *Client) cancelAll(typeURL string, a *everything, x *allWatch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if x.cancelled {
		return
	}
	x.cancelled = true
	a.watches = slices.DeleteFunc(a.watches, func(other *allWatch) bool { return other == x })
	if len(a.watches) > 0 {
		return
	}
	delete(c.all, typeURL)
	if c.stream != nil {
		c.stream.UnsubscribeAll(typeURL)
	}
	for k, e := range c.entries {
		if k.Type == typeURL && e.covered {
			delete(c.entries, k)
		}
	}
}

// updateAll takes the word on a whole type. The lock is held.
func (c *Client) updateAll(a *everything, u ads.Update) {
	a.synced, a.err = u.Synced, u.Err
	if u.Err != nil {
		c.cfg.Log.Error("everything of a type cannot be watched", "type", u.Type, "err", u.Err)
	}
	for _, x := range a.watches {
		c.tellSynced(x, a)
	}
}

// tellOf queues news of one resource. The lock is held.
func (c *Client) tellOf(x *allWatch, name string, e *entry) {
	if _, ok := x.news[name]; !ok {
		x.order = append(x.order, name)
	}
	x.news[name] = Resource{Decoded: e.value, Version: e.version, Err: e.err, Cached: e.cached}
	c.queueAll(x)
}

func (c *Client) tellSynced(x *allWatch, a *everything) {
	x.synced, x.syncedErr = true, a.err
	c.queueAll(x)
}

func (c *Client) queueAll(x *allWatch) {
	if !x.queued {
		x.queued = true
		c.allQueue = append(c.allQueue, x)
	}
	signal(c.wake)
}

// tellNextAll calls the watchers of whole types that have news now; false means that there were none.
func (c *Client) tellNextAll() bool {
	c.mu.Lock()
	queue := c.allQueue
	c.allQueue = nil
	c.mu.Unlock()
	for _, x := range queue {
		c.mu.Lock()
		news, order, synced, err := x.news, x.order, x.synced, x.syncedErr
		x.news, x.order, x.synced, x.queued = map[string]Resource{}, nil, false, false
		c.mu.Unlock()
		for _, name := range order {
			if !c.live(x) {
				break
			}
			x.w.Changed(name, news[name])
		}
		if synced && c.live(x) {
			x.w.Synced(err)
		}
	}
	return len(queue) > 0
}

func (c *Client) live(x *allWatch) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !x.cancelled
}
