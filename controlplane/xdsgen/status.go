package xdsgen

import (
	"fmt"
	"slices"
	"strings"

	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// maxGRPCRetries is what is left of num_retries in a gRPC client: gRFC A44 keeps gRFC A6's bound
// of five attempts in all.
const maxGRPCRetries = 4

// RouteStatus says what a kind of client makes of a route: "honoured", "approximated: ..." with
// the fields that it does not obey, or "rejected: ..." with the reason why it does not get the
// route. s, p and r must belong to the mesh that v was made of.
func (v *Views) RouteStatus(k Kind, s *ir.Service, p *ir.Port, r *ir.Route) string {
	if k == SDK {
		return "honoured" // the SDK matches and applies every field of ir
	}
	if why := withheldFromGRPC(s, p.Number, p.Protocol); why != "" {
		return "rejected: " + why
	}
	for _, h := range r.Match.Headers {
		if !matchedByGRPC(h.Name) {
			return fmt.Sprintf("rejected: gRPC clients do not match header %q, so that no call of theirs takes this route", h.Name)
		}
	}
	var weaker []string
	for i := range r.Backends {
		if why := v.closed[r.Backends[i].Cluster]; why != "" && r.Backends[i].Weight > 0 {
			weaker = append(weaker, fmt.Sprintf("calls to %s fail (%s)", r.Backends[i].Cluster, why))
		}
	}
	weaker = append(weaker, grpcApproximations(r)...)
	if len(weaker) == 0 {
		return "honoured"
	}
	return "approximated: " + strings.Join(weaker, "; ")
}

// grpcApproximations lists what gRPC's part of xDS has no field for.
func grpcApproximations(r *ir.Route) []string {
	var out []string
	if r.PerTry > 0 {
		out = append(out, "timeouts.perTry is not applied")
	}
	if r.Idle > 0 {
		out = append(out, "timeouts.idle is not applied")
	}
	if r.Retry == nil || r.Retry.Attempts == 0 {
		return out
	}
	var dropped []string
	for _, on := range r.Retry.On {
		if !retriedByGRPC[on] {
			dropped = append(dropped, string(on))
		}
	}
	for _, code := range r.Retry.Codes {
		dropped = append(dropped, fmt.Sprint(code))
	}
	if len(dropped) > 0 {
		out = append(out, "not retried on "+strings.Join(dropped, ", "))
	}
	if r.Retry.Attempts > maxGRPCRetries {
		out = append(out, fmt.Sprintf("at most %d retries of %d", maxGRPCRetries, r.Retry.Attempts))
	}
	return append(out, "the retry budget is not applied")
}

// matchedByGRPC says whether a gRPC client sees a header when it picks a route: the call's own
// metadata and content-type. It sees no pseudo header, none that the transport adds later, and
// gRFC A28 has binary headers never match.
func matchedByGRPC(name string) bool {
	if strings.HasPrefix(name, ":") || strings.HasSuffix(name, "-bin") {
		return false
	}
	return !slices.Contains([]string{"host", "user-agent", "te", "grpc-timeout", "grpc-previous-rpc-attempts"}, name)
}

// withheldFromGRPC says why a port is not served to a stock gRPC client; empty when it is.
func withheldFromGRPC(s *ir.Service, port uint16, p ir.Protocol) string {
	switch {
	case s.Unknown != "":
		return s.Unknown
	case s.MTLS == ir.Strict:
		return fmt.Sprintf("service %s.%s takes mutual TLS only, which a stock gRPC client is not given yet; "+
			"call it through the SDK or set spec.mtls: permissive", s.Name, s.Namespace)
	case p == ir.HTTP:
		return fmt.Sprintf("port %d of service %s.%s speaks HTTP/1.1, which a gRPC client cannot; "+
			"ask for a port of protocol GRPC or HTTP2", port, s.Name, s.Namespace)
	}
	return ""
}
