package xds

import (
	"context"
	"fmt"

	"github.com/inlay-mesh/inlay/xds/ads"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// deliver takes news from the stream, which holds its lock.
func (c *Client) deliver(u ads.Update) {
	c.inMu.Lock()
	c.inbox = append(c.inbox, u)
	c.inMu.Unlock()
	signal(c.wake)
}

// pump takes in what the stream delivered and tells the watchers, until nothing is left.
func (c *Client) pump() {
	for {
		c.inMu.Lock()
		in := c.inbox
		c.inbox = nil
		c.inMu.Unlock()
		c.mu.Lock()
		for _, u := range in {
			k, a := key(u.Name), c.all[u.Type]
			e := c.entries[k]
			switch {
			case a != nil && k.Name == wildcard:
				c.updateAll(a, u)
				continue
			case e == nil && a != nil && !u.NotExist:
				e = &entry{covered: true}
				c.entries[k] = e
			case e == nil:
				continue
			}
			c.update(k, e, u)
		}
		c.mu.Unlock()
		if told := c.tellNext(); !c.tellNextAll() && !told && len(in) == 0 {
			return
		}
	}
}

// tellNext calls the watchers that have news now; false means that there were none.
func (c *Client) tellNext() bool {
	c.mu.Lock()
	queue := c.queue
	c.queue = nil
	c.mu.Unlock()
	for _, x := range queue {
		c.mu.Lock()
		news, gone := x.news, x.cancelled
		x.news = nil
		c.mu.Unlock()
		if !gone && news != nil {
			x.w.Changed(*news)
		}
	}
	return len(queue) > 0
}

// update takes one piece of news. The lock is held.
func (c *Client) update(k key, e *entry, u ads.Update) {
	switch {
	case u.NotExist:
		e.value, e.version, e.cached, e.bytes = nil, "", false, nil
		e.err = fmt.Errorf("%s %q: %w", resource.Kind(k.Type), k.Name, ErrNotExist)
		e.rejected, e.rejectedVersion = "", ""
		if c.cache != nil {
			c.cache.remove(k)
		}
		if e.covered {
			delete(c.entries, k)
		}
	case u.Err != nil:
		e.rejected, e.rejectedVersion = u.Err.Error(), u.Version
		c.cfg.Log.Warn("resource rejected", "type", k.Type, "name", k.Name, "version", u.Version, "err", u.Err)
		if e.value != nil {
			return // the last good one still serves
		}
		e.err = fmt.Errorf("rejected: %w", u.Err)
	default:
		// SotW sends what did not change along with what did: the value stays the one that
		// consumers know, and they are not told.
		same, known := e.value != nil && string(e.bytes) == string(u.Bytes), e.value != nil && !e.cached
		e.rejected, e.rejectedVersion = "", ""
		e.version, e.cached, e.err = u.Version, false, nil
		if c.cache != nil {
			c.cache.put(RawResource{k.Type, k.Name, u.Version, u.Bytes})
		}
		if same && known {
			return
		}
		if !same {
			e.value, _ = u.Value.(*resource.Decoded)
			e.bytes = u.Bytes
		}
	}
	e.updated = c.cfg.Clock.Now()
	c.tellAll(k, e)
}

func (c *Client) tellAll(k key, e *entry) {
	for _, x := range e.watches {
		c.tell(x, e)
	}
	if a := c.all[k.Type]; a != nil {
		for _, x := range a.watches {
			c.tellOf(x, k.Name, e)
		}
	}
}

func (c *Client) tell(x *watch, e *entry) {
	if x.news == nil {
		c.queue = append(c.queue, x)
	}
	x.news = &Resource{Decoded: e.value, Version: e.version, Err: e.err, Cached: e.cached}
	signal(c.wake)
}

// saveLoop writes the cache, a while after it changed and once at the end.
func (c *Client) saveLoop(ctx context.Context) {
	select {
	case <-c.stored:
	case <-ctx.Done():
		return
	}
	c.mu.Lock()
	cache := c.cache
	c.mu.Unlock()
	for ctx.Err() == nil {
		select {
		case <-cache.changed:
		case <-ctx.Done():
		}
		if !cache.dirty() {
			continue
		}
		due := make(chan struct{})
		stop := c.cfg.Clock.AfterFunc(cache.cfg.Debounce, func() { close(due) })
		select {
		case <-due:
		case <-ctx.Done():
		}
		stop()
		cache.save(c.cfg.Clock.Now())
	}
	cache.save(c.cfg.Clock.Now()) // what came in meanwhile
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
