package flow

import (
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// entry is a flow as it is kept: the record with what its numbers meant when it was read, since
// a service may be gone when somebody asks. It is never written once it is in the ring.
type entry struct {
	event         bpfobj.InlayEvent
	time          time.Time
	local, remote end
	rule          Rule
}

// end is one side of a flow.
type end struct {
	name   string
	labels map[string]string
}

// Reasons of flows: those of the mesh, and why there was no policy to ask.
const (
	reasonOK            = "ok"             // a rule, or the default of the policies, allowed it
	reasonNoPolicy      = "no_policy"      // no policy speaks of the workload, or none of the peer
	reasonReset         = "reset"          // one side ended the connection by a reset
	reasonConnectFailed = "connect_failed" // allowed, but the far end refused or never answered
	reasonTimeout       = "timeout"        // the far end stopped to answer
	reasonDenied        = "denied"         // a rule denied it, or would have (verdict audited)
	reasonNoEndpoint    = "no_endpoint"    // the service has no endpoint that may be called
	reasonNoPort        = "no_port"        // the service has no such port
	reasonPolicyFull    = "policy_full"    // the policies of the workload found no room in the maps
	reasonAddressInUse  = "address_in_use" // another socket has made the same connection and lives
	reasonMapFull       = "map_full"       // a map that had to remember the connection was full
)

// resolve asks what the numbers of e stand for.
func (l *Log) resolve(e bpfobj.InlayEvent) *entry {
	n := &entry{event: e, time: l.wall(e.Time)}
	n.local, n.remote = l.end(e.Identity), l.end(e.Peer)
	if e.Rule != 0 {
		n.rule, _ = l.cfg.Namer.Rule(e.Rule)
	}
	// Refused before an endpoint was picked, so the service itself is whom it was for.
	if vip := addrPort(e.Vip, e.VipPort); e.Peer == 0 && e.Dir == dirEgress && vip.Addr().IsValid() {
		if name, _, ok := l.cfg.Namer.ServiceAt(vip, e.Proto); ok {
			n.remote.name = dotted(name)
		}
	}
	return n
}

// wall is the time of day at ns of CLOCK_MONOTONIC.
func (l *Log) wall(ns uint64) time.Time {
	return l.cfg.Clock.Now().Add(-time.Duration(l.cfg.Monotonic() - ns))
}

// end names a numeric identity (types.h, enum id).
func (l *Log) end(n uint64) end {
	switch bpfobj.InlayId(n) {
	case bpfobj.InlayIdID_HOST:
		return end{name: "host"}
	case bpfobj.InlayIdID_WORLD:
		return end{name: "world"}
	case bpfobj.InlayIdID_AGENT:
		return end{name: "agent"}
	}
	if n >= uint64(bpfobj.InlayIdID_FIRST) {
		if id, ok := l.cfg.Namer.Identity(n); ok {
			return end{name: id.Service + "." + id.Namespace, labels: id.Labels}
		}
	}
	return end{name: "unknown"}
}

// dotted turns NAMESPACE/NAME into NAME.NAMESPACE, and leaves the latter as it is.
func dotted(name string) string {
	if ns, service, ok := strings.Cut(name, "/"); ok {
		return service + "." + ns
	}
	return name
}

// flow is what people see of the entry, with the counts of e.
func (n *entry) flow(e bpfobj.InlayEvent) *nodepb.Flow {
	f := &nodepb.Flow{
		Time:          timestamppb.New(n.time),
		Kind:          kindNames[e.Kind],
		Direction:     "egress",
		Protocol:      protocolName(e.Proto),
		Verdict:       verdict(e),
		Reason:        reason(e),
		Policy:        n.rule.Policy,
		Rule:          n.rule.Name,
		Source:        n.rule.Source,
		BytesSent:     e.TxBytes,
		BytesReceived: e.RxBytes,
		Retransmits:   e.Retrans,
		Reset_:        e.Flags&uint8(bpfobj.InlayFlowFlagFLOW_RESET) != 0,
		BeforeAgent:   e.Flags&uint8(bpfobj.InlayFlowFlagFLOW_OLD) != 0,
		Errno:         uint32(e.Err),
	}
	if vip := addrPort(e.Vip, e.VipPort); vip.Addr().IsValid() {
		f.ServiceAddress = vip.String()
	}
	if e.SrttUs != 0 {
		f.Rtt = durationpb.New(time.Duration(e.SrttUs) * time.Microsecond)
	}
	if e.Start != 0 && e.Time >= e.Start {
		f.Duration = durationpb.New(time.Duration(min(e.Time-e.Start, math.MaxInt64)))
	}
	local := &nodepb.FlowPeer{Name: n.local.name, Identity: e.Identity, Labels: n.local.labels,
		Address: addressText(addrPort(e.Local, e.LocalPort))}
	remote := &nodepb.FlowPeer{Name: n.remote.name, Identity: e.Peer, Labels: n.remote.labels,
		Address: addressText(addrPort(e.Remote, e.RemotePort)),
		Hint:    e.Flags&uint8(bpfobj.InlayFlowFlagFLOW_HINT) != 0}
	f.From, f.To = local, remote
	if e.Dir == dirIngress {
		f.Direction, f.From, f.To = "ingress", remote, local
	}
	return f
}

var kindNames = map[uint8]string{kindClose: "close", kindSample: "sample", kindDenied: "denied", kindAudit: "audit"}

func protocolName(proto uint8) string {
	switch proto {
	case protoTCP:
		return "tcp"
	case protoUDP:
		return "udp"
	}
	return "icmp"
}

func verdict(e bpfobj.InlayEvent) string {
	switch {
	case e.Kind == kindAudit:
		return "audited"
	case e.Kind == kindDenied, e.Verdict == verdictDeny: // a living connection ended by a new deny has a close
		return "denied"
	}
	return "allowed"
}

func reason(e bpfobj.InlayEvent) string {
	const etimedout = 110
	has := func(flag bpfobj.InlayFlowFlag) bool { return e.Flags&uint8(flag) != 0 }
	if verdict(e) != "allowed" {
		switch {
		case has(bpfobj.InlayFlowFlagFLOW_FULL):
			return reasonMapFull
		case has(bpfobj.InlayFlowFlagFLOW_CLASH):
			return reasonAddressInUse
		case has(bpfobj.InlayFlowFlagFLOW_CLOSED):
			return reasonPolicyFull
		case has(bpfobj.InlayFlowFlagFLOW_NO_PORT):
			return reasonNoPort
		// A service address without endpoints is refused before any policy is asked.
		case e.Kind == kindDenied && e.Verdict != verdictDeny && e.Vip != (bpfobj.InlayAddr{}):
			return reasonNoEndpoint
		}
		return reasonDenied
	}
	switch {
	case has(bpfobj.InlayFlowFlagFLOW_RESET):
		return reasonReset
	case e.Kind == kindClose && e.Err != 0 && e.SrttUs == 0: // nobody ever answered
		return reasonConnectFailed
	case e.Kind == kindClose && e.Err == etimedout:
		return reasonTimeout
	case e.Rule == 0:
		return reasonNoPolicy
	}
	return reasonOK
}

// addressText is IP:PORT; IP where there is no port (ICMP); :PORT where the address is not known
// (the own one of a datagram exchange); empty where neither is.
func addressText(at netip.AddrPort) string {
	switch {
	case at.Addr().IsValid() && at.Port() != 0:
		return at.String()
	case at.Addr().IsValid():
		return at.Addr().String()
	case at.Port() != 0:
		return ":" + strconv.Itoa(int(at.Port()))
	}
	return ""
}

// nobody is the Namer that knows nothing.
type nobody struct{}

func (nobody) Identity(uint64) (Identity, bool)                       { return Identity{}, false }
func (nobody) Rule(uint32) (Rule, bool)                               { return Rule{}, false }
func (nobody) ServiceAt(netip.AddrPort, uint8) (string, uint16, bool) { return "", 0, false }
