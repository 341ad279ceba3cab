package export

import "go.opentelemetry.io/otel/attribute"

// Instruments of flows. Each flow is seen by the workload of this node: where both ends run here
// there are two, told apart by inlay.direction.
const (
	nameConnections = "inlay.flow.connections" // ended or refused, by verdict
	nameIO          = "inlay.flow.io"          // payload, both ways
	nameRetransmits = "inlay.flow.retransmits"
	nameRTT         = "inlay.flow.rtt"
	nameResets      = "inlay.flow.resets"
	nameDenied      = "inlay.flow.denied" // refused, or would have been (verdict audited), by reason
	nameOverflow    = "inlay.flow.overflow"
	nameSeries      = "inlay.flow.series"
)

// Instruments of the agent itself.
const (
	nameRecords     = "inlay.records"
	nameEvents      = "inlay.ebpf.events"
	nameRuns        = "inlay.ebpf.program.runs"
	nameRunTime     = "inlay.ebpf.program.time"
	nameMapEntries  = "inlay.ebpf.map.entries"
	nameMapCapacity = "inlay.ebpf.map.capacity"
	nameMapRefused  = "inlay.ebpf.map.refused"
	nameQueries     = "inlay.dns.queries"
	nameConfigAge   = "inlay.config.age"
	nameHeartbeat   = "inlay.proxy.heartbeat.age"
	nameBreakglass  = "inlay.breakglass"
	nameWorkloads   = "inlay.workloads"
	nameServices    = "inlay.services"
)

// Attributes of the conventions of OpenTelemetry.
const (
	keyPort        = attribute.Key("server.port") // 0: no port of a known service
	keyTransport   = attribute.Key("network.transport")
	keyIODirection = attribute.Key("network.io.direction") // transmit, receive: of the workload of this node
	keyService     = attribute.Key("service.name")
	keyVersion     = attribute.Key("service.version")
)

// Attributes of the mesh.
const (
	keySource      = attribute.Key("inlay.source")
	keyDestination = attribute.Key("inlay.destination")
	keyVerdict     = attribute.Key("inlay.verdict")
	keyDirection   = attribute.Key("inlay.direction")
	keyReason      = attribute.Key("inlay.reason")
	keyState       = attribute.Key("inlay.state")
	keyEvent       = attribute.Key("inlay.event")
	keyProgram     = attribute.Key("inlay.program")
	keyMap         = attribute.Key("inlay.map")
	keyOutcome     = attribute.Key("inlay.outcome")
)

// rttBounds are boundaries in seconds: within a machine it is microseconds, across the world a
// good part of a second.
var rttBounds = []float64{
	0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1,
}

// other is the source and destination of flows beyond the bound on series.
const other = "other"
