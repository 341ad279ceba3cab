package httpmesh_test

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// framed is a server of HTTP/2 that answers each request by the frames that answer writes.
type framed struct {
	streams atomic.Int64
	answer  func(f *http2.Framer, stream uint32, n int64) // the nth request from 1
}

func (s *framed) serve(t *testing.T, l net.Listener) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go s.conn(c)
		}
	}()
	t.Cleanup(func() { _ = l.Close() })
}

func (s *framed) conn(c net.Conn) {
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	f := http2.NewFramer(c, c)
	_ = f.WriteSettings()
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return
		}
		switch fr := frame.(type) {
		case *http2.SettingsFrame:
			if !fr.IsAck() {
				_ = f.WriteSettingsAck()
			}
		case *http2.DataFrame:
			if fr.StreamEnded() {
				s.answer(f, fr.StreamID, s.streams.Add(1))
			}
		}
	}
}

func ok(f *http2.Framer, stream uint32) {
	var b bytes.Buffer
	_ = hpack.NewEncoder(&b).WriteField(hpack.HeaderField{Name: ":status", Value: "204"})
	_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: b.Bytes(), EndHeaders: true, EndStream: true})
}

// A request that certainly was not processed is sent again without any policy, whatever its method;
// one that may have been is not.
func TestRefusedStreams(t *testing.T) {
	for name, tc := range map[string]struct {
		answer      func(f *http2.Framer, stream uint32, n int64)
		wantStreams int64
		wantOK      bool
	}{
		"REFUSED_STREAM": {func(f *http2.Framer, stream uint32, n int64) {
			if n == 1 {
				_ = f.WriteRSTStream(stream, http2.ErrCodeRefusedStream)
				return
			}
			ok(f, stream)
		}, 2, true},
		"GOAWAY below the stream": {func(f *http2.Framer, stream uint32, n int64) {
			if n == 1 {
				_ = f.WriteGoAway(0, http2.ErrCodeNo, nil)
				return
			}
			ok(f, stream)
		}, 2, true},
		"another code": {func(f *http2.Framer, stream uint32, _ int64) {
			_ = f.WriteRSTStream(stream, http2.ErrCodeInternal)
		}, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetwork()
			s := &framed{answer: tc.answer}
			addr := n.address()
			s.serve(t, n.listenOn(addr))
			m := newMesh(t, n, nil)
			cl := clusterOf(orders, endpointAt(addr))
			cl.HTTP2 = true
			m.publish(serviceOf("orders", nil, cl))
			// A body without GetBody: what was read of it is kept.
			req, err := http.NewRequestWithContext(ctxFor(t), http.MethodPost, "http://orders/", io.LimitReader(strings.NewReader("hello"), 5))
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = m.do(req)
			if s.streams.Load() != tc.wantStreams || (err == nil) != tc.wantOK {
				t.Errorf("%d streams, %v, want %d, ok %v", s.streams.Load(), err, tc.wantStreams, tc.wantOK)
			}
			if err != nil {
				wantReason(t, err, call.ReasonReset)
			}
		})
	}
}

// A pooled connection that the server has closed must not fail a request of which nothing was
// written, nor make it count as two.
func TestStaleConnectionIsReplaced(t *testing.T) {
	ca, n := newAuthority(t), newNetwork()
	s := (&server{name: "ok"}).start(t, n, ca.issue("orders"), true)
	m := newMesh(t, n, ca.issue("cart"))
	cl := clusterOf(orders, s.endpoint())
	cl.HTTP2 = true
	m.publish(serviceOf("orders", nil, cl))
	for range 20 {
		req, err := http.NewRequestWithContext(ctxFor(t), http.MethodPost, "http://orders/", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := m.do(req); err != nil {
			t.Fatal(err)
		}
		s.http.SetKeepAlivesEnabled(false) // GOAWAY to all
		s.http.SetKeepAlivesEnabled(true)
	}
	if s.calls.Load() != 20 {
		t.Errorf("%d calls, want 20", s.calls.Load())
	}
}
