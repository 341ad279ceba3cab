package httpmesh

import (
	"errors"
	"io"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/meshsdk/internal/grpcmesh"
)

// body is that of a request, given to one attempt after the other: by the request's GetBody, else by
// keeping what was read within the bounds of the engine.
type body struct {
	cl  *call.Call
	req *http.Request

	given   bool // to an attempt, by GetBody
	current *sending

	mu   sync.Mutex // guards what follows; held while src is read
	kept []byte     // what was read from src
	err  error      // of src, io.EOF too

	overflow atomic.Bool // kept is gone: the attempt that reads is the last
	final    atomic.Bool // no attempt follows
	once     sync.Once   // closes src
}

func (b *body) none() bool { return b.req.Body == nil || b.req.Body == http.NoBody }

// next gives the body for an attempt.
func (b *body) next(g *grpcmesh.Guard) (io.ReadCloser, error) {
	switch {
	case b.none():
		return b.req.Body, nil
	case b.req.GetBody != nil:
		if !b.given {
			b.given = true
			return b.moving(b.req.Body, g), nil
		}
		again, err := b.req.GetBody()
		if err != nil {
			return nil, err
		}
		return b.moving(again, g), nil
	case b.overflow.Load():
		return nil, errors.New("more was read than is kept")
	}
	if b.current != nil {
		b.current.gone.Store(true)
	}
	b.current = &sending{body: b, guard: g}
	return b.current, nil
}

// moving makes reading rc keep an idle call alive, where calls have such a time.
func (b *body) moving(rc io.ReadCloser, g *grpcmesh.Guard) io.ReadCloser {
	if b.cl.Idle() <= 0 {
		return rc
	}
	return &mover{rc, g}
}

type mover struct {
	io.ReadCloser
	guard *grpcmesh.Guard
}

func (m *mover) Read(p []byte) (int, error) {
	m.guard.Move()
	return m.ReadCloser.Read(p)
}

// again reports whether the body can be given to another attempt.
func (b *body) again() bool { return b.none() || b.req.GetBody != nil || !b.overflow.Load() }

// failed is the error of the caller's own body, nil for none that is known.
func (b *body) failed() error {
	if b.none() || b.req.GetBody != nil || !b.mu.TryLock() {
		return nil // still reading: not the reason
	}
	defer b.mu.Unlock()
	if b.err == io.EOF { //nolint:errorlint // io.EOF: "Read must return EOF itself, not an error wrapping EOF"
		return nil
	}
	return b.err
}

// end notes that no attempt follows. The caller's body is closed now when nothing was sent or the
// call has failed, else when net/http has done with it.
func (b *body) end(failed bool) {
	if b.req.Body == nil {
		return
	}
	b.final.Store(true)
	if b.req.GetBody != nil && b.given {
		return // net/http closes what it was given
	}
	if failed || b.current == nil || b.current.gone.Load() {
		b.close()
	}
}

func (b *body) close() { b.once.Do(func() { _ = b.req.Body.Close() }) }

// sending is the body as one attempt reads it.
type sending struct {
	body  *body
	guard *grpcmesh.Guard
	at    int         // read so far, in kept; guarded by body.mu
	gone  atomic.Bool // closed, or another attempt has taken its place
}

// Read gives what earlier attempts have read, then reads on.
func (s *sending) Read(p []byte) (int, error) {
	b := s.body
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.gone.Load() {
		return 0, http.ErrBodyReadAfterClose
	}
	s.guard.Move()
	if !b.overflow.Load() && s.at < len(b.kept) {
		n := copy(p, b.kept[s.at:])
		s.at += n
		return n, nil
	}
	if b.err != nil {
		return 0, b.err
	}
	// An attempt that has gone may still sit here: what it reads is kept for the next one.
	n, err := b.req.Body.Read(p)
	b.err = err
	switch {
	case b.overflow.Load() || n == 0:
	case b.cl.Reserve(n):
		b.kept = append(b.kept, p[:n]...)
		s.at += n
	default:
		b.overflow.Store(true)
		b.kept = nil
		b.cl.Unreserve()
	}
	return n, err
}

// Close is net/http's word that it has done with the body.
func (s *sending) Close() error {
	s.gone.Store(true)
	if s.body.final.Load() {
		s.body.close()
	}
	return nil
}
