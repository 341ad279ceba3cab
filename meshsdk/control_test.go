package meshsdk_test

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/inlay-mesh/inlay/meshsdk"
)

// dark is a network that can lose everything without a word.
type dark struct {
	dial  func(ctx context.Context, network, addr string) (net.Conn, error)
	lost  atomic.Bool
	dials atomic.Int64
}

func (d *dark) connect(ctx context.Context, network, addr string) (net.Conn, error) {
	d.dials.Add(1)
	if d.lost.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c, err := d.dial(ctx, network, addr)
	return &darkConn{Conn: c, net: d, closed: make(chan struct{})}, err
}

type darkConn struct {
	net.Conn
	net    *dark
	closed chan struct{}
	once   sync.Once
}

func (c *darkConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.net.lost.Load() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *darkConn) Write(p []byte) (int, error) {
	if c.net.lost.Load() {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c *darkConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// connected waits until the Mesh is connected to its control plane, or is not.
func connected(m *meshsdk.Mesh, want bool) {
	for m.Status().ControlPlane.Connected != want {
		time.Sleep(time.Second)
	}
}

func TestAControlPlaneThatVanishesIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		d := &dark{dial: p.net.dial}
		m := p.open("default", "cart", meshsdk.WithDialer(d.connect))
		connected(m, true)
		synctest.Wait()
		d.lost.Store(true)
		start := time.Now()
		connected(m, false)
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("noticed after %v, want at most 30 s", took)
		}
		d.lost.Store(false)
		start = time.Now()
		connected(m, true)
		if took := time.Since(start); took > 15*time.Second { // an attempt that hangs, and a back-off
			t.Errorf("back after %v", took)
		}
		m.Close()
	})
}

// gRPC, keepalive.EnforcementPolicy.MinTime: "The current default value is 5 minutes." A control plane
// of another maker sends away who asks more often.
func TestAControlPlaneThatWantsFewPingsIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlane(t)
		d := &dark{dial: p.net.dial}
		m := p.open("default", "cart", meshsdk.WithDialer(d.connect))
		connected(m, true)
		time.Sleep(time.Hour)
		connected(m, true)
		if n := d.dials.Load(); n > 2 {
			t.Errorf("connected %d times within an hour, want at most 2", n)
		}
		m.Close()
	})
}
