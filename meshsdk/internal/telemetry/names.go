package telemetry

import (
	"strconv"

	"go.opentelemetry.io/otel/attribute"

	"github.com/inlay-mesh/inlay/meshsdk/internal/call"
)

// Instruments, by the semantic conventions of OpenTelemetry 1.43: durations in seconds. Rate and
// errors are the counts of the same histogram, by inlay.reason.
var instruments = [4]struct{ name, text string }{
	{"rpc.client.call.duration", "Measures the duration of outbound remote procedure calls (RPC)."},
	{"rpc.server.call.duration", "Measures the duration of inbound remote procedure calls (RPC)."},
	{"http.client.request.duration", "Duration of HTTP client requests."},
	{"http.server.request.duration", "Duration of HTTP server requests."},
}

func instrument(rec *call.Record) int {
	i := 0
	if !rec.GRPC {
		i = 2
	}
	if rec.Direction == "server" {
		i++
	}
	return i
}

// secondsBounds are the boundaries that the conventions advise for these instruments, with four
// finer ones: calls within a mesh often take less than 5 ms.
var secondsBounds = []float64{
	0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
}

// Attributes of the conventions.
const (
	keyRPCSystem  = attribute.Key("rpc.system.name")
	keyRPCMethod  = attribute.Key("rpc.method")
	keyRPCCode    = attribute.Key("rpc.response.status_code")
	keyHTTPMethod = attribute.Key("http.request.method")
	keyHTTPStatus = attribute.Key("http.response.status_code")
	keyResend     = attribute.Key("http.request.resend_count")
	keyServer     = attribute.Key("server.address")
	keyErrorType  = attribute.Key("error.type")
	keyURLPath    = attribute.Key("url.path")
	keyOverflow   = attribute.Key("otel.metric.overflow")
)

// Attributes of the mesh: on metrics and spans ...
const (
	keyService = attribute.Key("inlay.service")
	keyRoute   = attribute.Key("inlay.route")
	keyPeer    = attribute.Key("inlay.peer")
	keyVersion = attribute.Key("inlay.version")
	keyReason  = attribute.Key("inlay.reason")
	keyMTLS    = attribute.Key("inlay.mtls")
)

// ... and on spans only.
const (
	keyCluster     = attribute.Key("inlay.cluster")
	keyRevision    = attribute.Key("inlay.revision")
	keyRouteSource = attribute.Key("inlay.route.source")
	keyLimits      = attribute.Key("inlay.limits")
	keyAttempts    = attribute.Key("inlay.attempts")
	keyAttempt     = attribute.Key("inlay.attempt")
	keyOutcome     = attribute.Key("inlay.outcome")
	keyTook        = attribute.Key("inlay.took_us")
)

// attributes of a call, for metric and span alike. Paths of HTTP are not among them: their number
// has no bound.
func attributes(rec *call.Record) []attribute.KeyValue {
	kv := make([]attribute.KeyValue, 0, 12)
	kv = append(kv, keyService.String(rec.Service), keyReason.String(string(rec.Reason)), keyMTLS.Bool(rec.MTLS))
	if rec.Peer != "" {
		kv = append(kv, keyPeer.String(rec.Peer))
	}
	if rec.Direction == "client" {
		kv = append(kv, keyServer.String(rec.Service))
		if rec.Route != "" {
			kv = append(kv, keyRoute.String(rec.Route))
		}
		if rec.Version != "" {
			kv = append(kv, keyVersion.String(rec.Version))
		}
	}
	failed := rec.Reason != call.ReasonOK
	if rec.GRPC {
		kv = append(kv, keyRPCSystem.String("grpc"), keyRPCMethod.String(spanName(true, "", rec.Path)))
		if rec.GRPCCode >= 0 {
			kv = append(kv, keyRPCCode.String(codeName(rec.GRPCCode)))
		}
	} else {
		kv = append(kv, keyHTTPMethod.String(knownMethod(rec.Method)))
		if rec.HTTPStatus != 0 {
			kv = append(kv, keyHTTPStatus.Int(rec.HTTPStatus))
		}
	}
	if failed {
		// error.type: the code when the far end answered with one, else what the mesh says.
		switch {
		case rec.Reason != call.ReasonUpstreamStatus:
			kv = append(kv, keyErrorType.String(string(rec.Reason)))
		case rec.GRPC:
			kv = append(kv, keyErrorType.String(codeName(rec.GRPCCode)))
		default:
			kv = append(kv, keyErrorType.String(strconv.Itoa(rec.HTTPStatus)))
		}
	}
	return kv
}

const otherMethod = "_OTHER"

// knownMethod: HTTP conventions, "If the HTTP request method is not known to instrumentation, it
// MUST set the http.request.method attribute to _OTHER".
func knownMethod(m string) string {
	switch m {
	case "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH":
		return m
	}
	return otherMethod
}

var codeNames = [...]string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
	"ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
	"OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}

// codeName is the name of a gRPC status code as the conventions write it.
func codeName(code int) string {
	if code >= 0 && code < len(codeNames) {
		return codeNames[code]
	}
	return strconv.Itoa(code)
}
