package meshsdk

import (
	"errors"
	"sync"

	"github.com/inlay-mesh/inlay/xds/graph"
)

type graphConfig = graph.Config

var errNoConfig = errors.New("no configuration yet")

// watchGraph is what of graph.Graph is used.
type watchGraph interface {
	Watch(listener string, f func(*graph.Config)) (cancel func())
}

// config gives out watches of listeners before there is anything to watch: the client of the
// control plane starts when this process knows who it is, calls may come sooner.
type config struct {
	mu    sync.Mutex
	graph watchGraph // nil before begin
	self  self
	waits map[*waiting]struct{}
}

// waiting is one watch.
type waiting struct {
	name func(self) string
	f    func(*graph.Config)

	mu     sync.Mutex
	gone   bool
	cancel func() // nil before the graph is there
}

func newConfig() *config { return &config{waits: make(map[*waiting]struct{})} }

// watch calls f with each configuration of a listener, in order and never twice at once. name is
// asked once, when it is known who this process is.
func (c *config) watch(name func(self) string, f func(*graph.Config)) (cancel func()) {
	w := &waiting{name: name, f: f}
	c.mu.Lock()
	g, s := c.graph, c.self
	if g == nil {
		c.waits[w] = struct{}{}
	}
	c.mu.Unlock()
	if g != nil {
		w.begin(g, s)
	}
	return func() {
		c.mu.Lock()
		delete(c.waits, w)
		c.mu.Unlock()
		w.end()
	}
}

// begin starts the watches that were waiting; later ones start at once.
func (c *config) begin(g watchGraph, s self) {
	c.mu.Lock()
	c.graph, c.self = g, s
	waits := c.waits
	c.waits = nil
	c.mu.Unlock()
	for w := range waits {
		w.begin(g, s)
	}
}

func (w *waiting) begin(g watchGraph, s self) {
	cancel := g.Watch(w.name(s), func(cfg *graph.Config) {
		w.mu.Lock()
		gone := w.gone
		w.mu.Unlock()
		if !gone {
			w.f(cfg)
		}
	})
	w.mu.Lock()
	gone := w.gone
	w.cancel = cancel
	w.mu.Unlock()
	if gone {
		cancel()
	}
}

func (w *waiting) end() {
	w.mu.Lock()
	was, cancel := w.gone, w.cancel
	w.gone = true
	w.mu.Unlock()
	if !was && cancel != nil {
		cancel()
	}
}
