package meshsdk

import (
	"context"
	"sync"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
)

// namesWait is how long after Open the question whether NAME.NAMESPACE is of the mesh waits for
// the first announcement. A wrong answer would send a call of the mesh outside.
const namesWait = 2 * time.Second

// names tells the names of the mesh from those outside.
type names struct {
	mu         sync.Mutex
	namespaces []string
	own        string // of this workload; empty while unknown
	settled    chan struct{}
	isSettled  bool
}

// newNames starts the time in which names wait for an announcement; it ends at settle.
func newNames() *names { return &names{settled: make(chan struct{})} }

// settle ends waiting: an announcement is there, or will not come soon.
func (n *names) settle() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.isSettled {
		n.isSettled = true
		close(n.settled)
	}
}

// announce replaces the namespaces that the control plane knows.
func (n *names) announce(namespaces []string) {
	n.mu.Lock()
	n.namespaces = namespaces
	n.mu.Unlock()
	if len(namespaces) > 0 {
		n.settle()
	}
}

// setOwn says which namespace is ours.
func (n *names) setOwn(namespace string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.own = namespace
}

// list is what was announced last.
func (n *names) list() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.namespaces
}

// listener gives the listener of a target of the mesh; ok is false for one outside. Only a name
// whose answer hangs on the namespaces waits for them; an error is that of ctx, which ended first.
func (n *names) listener(ctx context.Context, target string) (listener string, ok bool, err error) {
	for {
		n.mu.Lock()
		own, namespaces, settled := n.own, n.namespaces, n.isSettled
		n.mu.Unlock()
		asked := false
		listener, ok := grpcmesh.Parse(target, func() []string { asked = true; return namespaces }, own)
		if ok || !asked || settled {
			return listener, ok, nil
		}
		select {
		case <-n.settled:
		case <-ctx.Done():
			return "", false, context.Cause(ctx)
		}
	}
}
