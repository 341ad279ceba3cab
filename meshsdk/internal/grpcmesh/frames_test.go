package grpcmesh_test

import (
	"bytes"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// framed is a server that answers each stream by frames, as refuse or answer says, or with an OK.
type framed struct {
	streams atomic.Int64
	refuse  func(n int64) http2.ErrCode // of the nth stream from 1; 0 answers OK
	// answer, when not nil, answers the nth stream from 1; false answers OK.
	answer func(n int64, f *http2.Framer, stream uint32) bool
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
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := readFull(c, preface); err != nil {
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
		case *http2.PingFrame:
			if !fr.IsAck() {
				_ = f.WritePing(true, fr.Data)
			}
		case *http2.DataFrame:
			if !fr.StreamEnded() {
				continue
			}
			nth := s.streams.Add(1)
			if s.answer != nil {
				if s.answer(nth, f, fr.StreamID) {
					continue
				}
			} else if code := s.refuse(nth); code != 0 {
				_ = f.WriteRSTStream(fr.StreamID, code)
				continue
			}
			var b bytes.Buffer
			enc := hpack.NewEncoder(&b)
			for _, h := range []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"}} {
				_ = enc.WriteField(h)
			}
			_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: fr.StreamID, BlockFragment: b.Bytes(), EndHeaders: true})
			_ = f.WriteData(fr.StreamID, false, make([]byte, 5)) // an empty message
			b.Reset()
			_ = enc.WriteField(hpack.HeaderField{Name: "grpc-status", Value: "0"})
			_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: fr.StreamID, BlockFragment: b.Bytes(), EndHeaders: true, EndStream: true})
		}
	}
}

func readFull(c net.Conn, p []byte) (int, error) {
	for n := 0; n < len(p); {
		m, err := c.Read(p[n:])
		if err != nil {
			return n, err
		}
		n += m
	}
	return len(p), nil
}

// What a server refused was certainly not processed: gRPC sends it again once by itself in each
// attempt, and the mesh makes one more attempt without any policy.
func TestRefusedStreams(t *testing.T) {
	always := func(int64) http2.ErrCode { return http2.ErrCodeRefusedStream }
	for name, tc := range map[string]struct {
		refuse      func(int64) http2.ErrCode
		policy      *resource.Retry
		wantStreams int64
		wantOK      bool
	}{
		"two are made good without a policy":  {func(n int64) http2.ErrCode { return code(n <= 2, http2.ErrCodeRefusedStream) }, nil, 3, true},
		"without end it fails":                {always, nil, 4, false},
		"with a policy up to its attempts":    {always, &resource.Retry{On: []string{"refused-stream"}, Attempts: 2}, 6, false},
		"another code is not repeated":        {func(int64) http2.ErrCode { return http2.ErrCodeInternal }, nil, 1, false},
		"another code is, by a policy for it": {func(n int64) http2.ErrCode { return code(n <= 2, http2.ErrCodeInternal) }, &resource.Retry{On: []string{"reset"}, Attempts: 2}, 3, true},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetwork()
			s := &framed{refuse: tc.refuse}
			addr := n.address()
			s.serve(t, n.listenOn(addr))
			m := newMesh(t, n, nil)
			m.publish(serviceOf("orders", retrying("c", tc.policy), clusterOf("c", endpointAt(addr))))
			_, err := m.test("orders").UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
			if s.streams.Load() != tc.wantStreams || (err == nil) != tc.wantOK {
				t.Errorf("%d streams, %v, want %d, ok %v", s.streams.Load(), err, tc.wantStreams, tc.wantOK)
			}
			if err != nil && tc.policy == nil {
				wantCode(t, err, codes.Unavailable, call.ReasonReset)
			}
		})
	}
}

func code(is bool, c http2.ErrCode) http2.ErrCode {
	if is {
		return c
	}
	return 0
}

// What an attempt has received decides whether it may be repeated: response headers commit the call,
// a status alone (gRPC over HTTP2: Trailers-Only) and an error page of something in between do not.
func TestUnaryIsRepeatedUntilHeadersCame(t *testing.T) {
	const grpc = "application/grpc"
	type block []hpack.HeaderField
	for name, tc := range map[string]struct {
		blocks    []block // of the first stream; the last one ends it
		wantCalls int64
	}{
		"a status alone":             {[]block{{{Name: ":status", Value: "200"}, {Name: "content-type", Value: grpc}, {Name: "grpc-status", Value: "14"}}}, 2},
		"a status after headers":     {[]block{{{Name: ":status", Value: "200"}, {Name: "content-type", Value: grpc}}, {{Name: "grpc-status", Value: "14"}}}, 1},
		"a page":                     {[]block{{{Name: ":status", Value: "503"}, {Name: "content-type", Value: "text/html"}}}, 2},
		"a page without type":        {[]block{{{Name: ":status", Value: "503"}}}, 2},
		"a page that says it is one": {[]block{{{Name: ":status", Value: "503"}, {Name: "content-type", Value: "text/html"}}, {{Name: "x-end", Value: "1"}}}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetwork()
			s := &framed{answer: func(n int64, f *http2.Framer, stream uint32) bool {
				if n > 1 {
					return false
				}
				for i, block := range tc.blocks {
					var b bytes.Buffer
					enc := hpack.NewEncoder(&b)
					enc.SetMaxDynamicTableSize(0)
					for _, h := range block {
						_ = enc.WriteField(h)
					}
					_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: b.Bytes(), EndHeaders: true, EndStream: i == len(tc.blocks)-1})
				}
				return true
			}}
			addr := n.address()
			s.serve(t, n.listenOn(addr))
			m := newMesh(t, n, nil)
			policy := &resource.Retry{On: []string{"unavailable"}, Attempts: 2, Base: time.Nanosecond, Max: time.Nanosecond}
			m.publish(serviceOf("orders", retrying("c", policy), clusterOf("c", endpointAt(addr))))
			_, err := m.test("orders").UnaryCall(ctxFor(t), &testpb.SimpleRequest{})
			if s.streams.Load() != tc.wantCalls || (err == nil) != (tc.wantCalls > 1) {
				t.Errorf("%d streams, %v, want %d", s.streams.Load(), err, tc.wantCalls)
			}
			if err != nil {
				wantCode(t, err, codes.Unavailable, call.ReasonUpstreamStatus)
			}
		})
	}
}
