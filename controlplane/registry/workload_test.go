package registry

import (
	"testing"
	"testing/synctest"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// A workload that serves nobody is no endpoint: neither does the SDK of the same run take its
// place, nor does it take another's.
func TestAWorkloadWithoutPortsStaysBesideTheSDK(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, Config{})
		defer h.stop()
		workload := func(in *registrypb.Instance) {
			program(in)
			in.Ports, in.Addresses = nil, []string{"10.0.0.1"}
		}
		n := h.open(node)
		if got := n.must(instance(workload)).GetRegistered(); got.GetUnreachable() != "" || got.GetLeaseSeconds() == 0 {
			t.Errorf("registered = %v, want reachable: nobody calls it", got)
		}
		sdk := func(in *registrypb.Instance) { in.RunId = "run-1" }
		h.open(orders).must(instance(sdk))
		if got := n.must(renew).GetRegistered(); got.GetLeaseSeconds() == 0 {
			t.Errorf("renewed = %v: the SDK took its place", got)
		}
		snap := h.reg.Snapshot().Instances
		if len(snap) != 2 || snap[0].ID != "i-1" || snap[1].ID != "node-1" || len(snap[1].Ports) != 0 || len(snap[1].Addresses) != 1 {
			t.Errorf("instances = %+v, want the program's and the workload", snap)
		}
		other := func(in *registrypb.Instance) { workload(in); in.InstanceId = "node-2" }
		h.open(node).must(instance(other))
		if n := len(h.reg.Snapshot().Instances); n != 3 {
			t.Errorf("%d instances, want a second workload beside the SDK", n)
		}
	})
}

// The mode of a service is about TLS, which a plain port has not, whatever its instances say.
func TestPlainPortsAreReachableInAStrictService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		plain := map[uint16]bool{53: true, 80: true} // as a MeshService declares it
		h := start(t, Config{
			MTLSMode: func(string, string) ir.MTLS { return ir.Strict },
			Plain:    func(_, _ string, p PortBinding) bool { return plain[p.Port] },
		})
		defer h.stop()
		for name, tc := range map[string]struct {
			ports     []uint32
			protocol  registrypb.Protocol
			reachable bool
		}{
			"udp, declared so":          {[]uint32{53}, registrypb.Protocol_PROTOCOL_UDP, true},
			"said http, declared plain": {[]uint32{80}, registrypb.Protocol_PROTOCOL_HTTP, true},
			"said tcp, declared http":   {[]uint32{81}, registrypb.Protocol_PROTOCOL_TCP, false},
			"one of two is not plain":   {[]uint32{53, 81}, registrypb.Protocol_PROTOCOL_TCP, false},
		} {
			in := instance(func(in *registrypb.Instance) {
				program(in)
				in.Ports = nil
				for _, p := range tc.ports {
					in.Ports = append(in.Ports, &registrypb.Port{Port: p, Protocol: tc.protocol, Addresses: []string{"10.0.0.1:1000"}})
				}
			})
			if got := h.open(node).must(in).GetRegistered().GetUnreachable(); (got == "") != tc.reachable {
				t.Errorf("%s: unreachable = %q", name, got)
			}
		}
	})
}

func TestWithoutConfigurationThePlainPortIsTheRegisteredOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := start(t, Config{})
		defer h.stop()
		tcp := func(in *registrypb.Instance) { program(in); in.Ports[0].Protocol = registrypb.Protocol_PROTOCOL_TCP }
		if got := h.open(node).must(instance(tcp)).GetRegistered().GetUnreachable(); got != "" {
			t.Errorf("unreachable = %q", got)
		}
		if got := h.open(node).must(instance(program)).GetRegistered().GetUnreachable(); got == "" {
			t.Error("a strict HTTP port without mesh TLS is said to be reachable")
		}
	})
}
