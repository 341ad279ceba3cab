package tcpmesh

import (
	"errors"
	"sync/atomic"

	"github.com/inlay-mesh/inlay/xds/graph"
	"github.com/inlay-mesh/inlay/xds/resource"
)

// Mode says which connections a port of the service takes. The zero value takes mesh TLS with a
// client's SVID and nothing else: what is not known is strict.
type Mode struct {
	// Plaintext lets connections in that do not begin with a TLS handshake.
	Plaintext bool
	// Anonymous lets TLS clients in that show no SVID.
	Anonymous bool
	// NoTLS refuses TLS: no chain of the listener takes it.
	NoTLS bool
}

// String is the mode's name in texts.
func (m Mode) String() string {
	switch {
	case m.NoTLS && m.Plaintext:
		return "plaintext"
	case m.NoTLS:
		return "closed"
	case m.Plaintext:
		return "permissive"
	}
	return "strict"
}

// ModeOf reads the mode from the port's listener resource. The error says why the mode is not
// known; the mode beside it is then strict: fail closed.
func ModeOf(cfg *graph.Config) (Mode, error) {
	switch {
	case cfg == nil:
		return Mode{}, errors.New("no configuration yet")
	case cfg.Err != nil:
		return Mode{}, cfg.Err
	case cfg.Listener == nil || cfg.Listener.API != nil:
		return Mode{}, errors.New("the resource is the listener of a client: want one with filter chains")
	}
	tls := choose(cfg.Listener, "tls")
	raw := choose(cfg.Listener, "raw_buffer")
	// A chain chosen by its match and with the other kind of transport socket closes what it gets:
	// plaintext to a chain with TLS is no handshake, TLS to a chain without it is no HTTP.
	m := Mode{Plaintext: raw != nil && raw.TLS == nil, NoTLS: tls == nil || tls.TLS == nil}
	if !m.NoTLS {
		m.Anonymous = !tls.TLS.RequireClientCertificate
	}
	return m, nil
}

// choose returns the chain for a transport protocol, nil when there is none. Envoy, listener.proto,
// filter_chains: "The FilterChain with the most specific FilterChainMatch criteria is used on a
// connection", and default_filter_chain: "The default filter chain if none of the filter chain
// matches. If no default filter chain is supplied, the connection will be closed."
func choose(l *resource.Listener, transport string) *resource.Chain {
	var other *resource.Chain // one for any transport
	for i := range l.Chains {
		switch c := &l.Chains[i]; c.TransportProtocol {
		case transport:
			return c
		case "":
			if other == nil {
				other = c
			}
		}
	}
	if other != nil {
		return other
	}
	return l.Default
}

// Stats counts the connections of all listeners that share it. Safe for concurrent use.
type Stats struct {
	// MTLS, Anonymous and Plaintext were accepted: with the peer's SVID, by TLS without one, and
	// without TLS.
	MTLS, Anonymous, Plaintext atomic.Int64
	// Refused were closed because they did not begin as the mode wants (plaintext to a strict
	// service); Failed broke or timed out before their first byte or in the handshake.
	Refused, Failed atomic.Int64
}
