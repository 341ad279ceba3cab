package httpmesh

import (
	"maps"
	"slices"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/endpoint"
)

func keyOf(ep *endpoint.Endpoint, cl *call.Cluster) poolKey { return poolKey{ep.Key, cl.HTTP2} }

// pool gives the pool of an endpoint; nil once the Transport is closed.
func (t *Transport) pool(ep *endpoint.Endpoint, cl *call.Cluster) *pool {
	k := keyOf(ep, cl)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	p := t.pools[k]
	if p == nil {
		p = &pool{t: t, id: k, tls: ep.TLS, addrs: ep.Addresses, timeout: cl.ConnectTimeout}
		t.pools[k] = p
		t.every[p] = struct{}{}
		t.arm()
		return p
	}
	p.mu.Lock()
	p.timeout = cl.ConnectTimeout
	p.mu.Unlock()
	return p
}

// follow makes the engine tell which endpoints of a listener have gone.
func (t *Transport) follow(listener string) {
	if _, ok := t.followed.LoadOrStore(listener, struct{}{}); ok {
		return
	}
	stop := t.cfg.Engine.Follow(listener, func(s *call.Service) { t.changed(listener, s) })
	t.mu.Lock()
	closed := t.closed
	if _, still := t.followed.Load(listener); still && !closed {
		t.stops[listener] = stop
		stop = nil
	}
	t.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// changed retires the pools that no listener asks for any more. s is nil when nobody calls the
// listener any more. It does not block.
func (t *Transport) changed(listener string, s *call.Service) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.live[listener]
	delete(t.live, listener)
	if s == nil {
		t.followed.Delete(listener)
		delete(t.stops, listener)
	} else {
		now := make(map[poolKey]bool)
		for _, cl := range s.Clusters {
			for _, ep := range cl.All {
				if ep.Excluded == "" {
					now[keyOf(ep, cl)] = true
				}
			}
		}
		t.live[listener] = now
	}
	for k := range before {
		asked := false
		for _, live := range t.live {
			asked = asked || live[k]
		}
		if asked {
			continue
		}
		t.aside.remove(k)
		if p := t.pools[k]; p != nil {
			delete(t.pools, k)
			t.spawn(p.retire)
		}
	}
}

// idleTimeout is that of the base transport; zero in it means none, and 90 s here, as in
// http.DefaultTransport: endpoints come and go.
func (t *Transport) idleTimeout() time.Duration {
	if d := t.cfg.Base.IdleConnTimeout; d > 0 {
		return d
	}
	return 90 * time.Second
}

// arm makes the next sweep due; t.mu is held.
func (t *Transport) arm() {
	if t.sweep == nil && !t.closed && len(t.every) > 0 {
		t.sweep = t.cfg.Clock.AfterFunc(t.idleTimeout()/2, func() {
			t.mu.Lock()
			t.sweep = nil
			t.mu.Unlock()
			t.expire(t.idleTimeout())
			t.mu.Lock()
			t.arm()
			t.mu.Unlock()
		})
	}
}

// expire closes the connections that were idle for longer than most.
func (t *Transport) expire(most time.Duration) {
	now := t.cfg.Clock.Now()
	t.mu.Lock()
	all := slices.Collect(maps.Keys(t.every))
	t.mu.Unlock()
	for _, p := range all {
		if !p.expire(now, most) {
			continue
		}
		// Somebody may have got it for a request meanwhile: it then goes on in every, and ends as
		// a retired one does.
		t.mu.Lock()
		if t.pools[p.id] == p {
			delete(t.pools, p.id)
		}
		if p.empty() {
			delete(t.every, p)
		}
		t.mu.Unlock()
	}
}

// CloseIdleConnections closes the connections that nobody uses, those to the outside too.
func (t *Transport) CloseIdleConnections() {
	t.expire(0)
	t.cfg.Base.CloseIdleConnections()
}

// Close ends every connection of the mesh, also those in use, and waits until nothing of the
// Transport runs any more. Requests after it fail. It may be called twice.
func (t *Transport) Close() {
	t.mu.Lock()
	t.closed = true
	all := slices.Collect(maps.Keys(t.every))
	clear(t.pools)
	clear(t.every)
	var stops []func()
	for _, stop := range t.stops {
		stops = append(stops, stop)
	}
	clear(t.stops)
	if t.sweep != nil {
		t.sweep()
		t.sweep = nil
	}
	t.mu.Unlock()
	t.spawning.Lock()
	t.cancel()
	t.spawning.Unlock()
	for _, stop := range stops {
		stop()
	}
	for _, p := range all {
		p.close()
	}
	t.wg.Wait()
}

// spawn runs f in a goroutine that Close waits for; false once the Transport is closed, and f is
// then not run.
func (t *Transport) spawn(f func()) bool {
	t.spawning.Lock()
	defer t.spawning.Unlock()
	if t.ctx.Err() != nil {
		return false
	}
	t.wg.Go(f)
	return true
}
