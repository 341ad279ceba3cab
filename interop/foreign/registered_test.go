package foreign

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	// Others' protobufs: what a control plane for Envoy and a SPIFFE workload link. The server of
	// ads_test.go and go-spiffe's client bring the rest.
	_ "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/load_balancing_policies/least_request/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	_ "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	_ "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	_ "google.golang.org/grpc/xds"

	_ "github.com/inlay-mesh/inlay/examples/hellopb"
	_ "github.com/inlay-mesh/inlay/identity/workloadpb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/capb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/extpb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
	_ "github.com/inlay-mesh/inlay/xds/xdspb"
)

// linked are the files registered in this binary: ours and those of others. That it started is
// half of the proof, since protobuf-go panics on a collision (unless it is told not to).
func linked() (ours, others []protoreflect.FileDescriptor) {
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if isOurs(f) {
			ours = append(ours, f)
		} else {
			others = append(others, f)
		}
		return true
	})
	return ours, others
}

// isOurs asks the Go package, not the path or the names, which are what is to be tested.
func isOurs(f protoreflect.FileDescriptor) bool {
	o, ok := f.Options().(interface{ GetGoPackage() string })
	return ok && strings.HasPrefix(o.GetGoPackage(), "github.com/inlay-mesh/inlay")
}

// registryOf registers files anew, where a collision is an error.
func registryOf(t *testing.T, files []protoreflect.FileDescriptor) *protoregistry.Files {
	t.Helper()
	r := &protoregistry.Files{}
	for _, f := range files {
		if err := r.RegisterFile(f); err != nil {
			t.Fatalf("%s among the files of others: %v", f.Path(), err)
		}
	}
	return r
}

// TestProtosBesideOthers: our messages link beside go-control-plane's and go-spiffe's, the trimmed
// copies of both included: own file paths, own package names, no name twice.
func TestProtosBesideOthers(t *testing.T) {
	ours, others := linked()
	t.Logf("%d files of ours beside %d of others", len(ours), len(others))
	seen := map[string]bool{}
	for _, f := range others {
		seen[string(f.Package())] = true
	}
	// go-spiffe's workload.proto has no package: its names are at the top.
	for _, want := range []string{"envoy.config.route.v3", "envoy.service.discovery.v3", ""} {
		if !seen[want] {
			t.Errorf("package %q is not linked: there is nothing to collide with", want)
		}
	}
	if len(ours) < 9 {
		t.Errorf("%d files of ours, want at least 9", len(ours))
	}
	r := registryOf(t, others)
	for _, f := range ours {
		if err := r.RegisterFile(f); err != nil {
			t.Errorf("%s collides: %v", f.Path(), err)
		}
		if !strings.HasPrefix(f.Path(), "inlay/") || !strings.HasPrefix(string(f.Package()), "inlay.") {
			t.Errorf("file %s of package %q: want both below inlay", f.Path(), f.Package())
		}
	}
}

// TestCollisionIsNoticed: a file of ours that took the path of another, or its names, would fail
// the test above.
func TestCollisionIsNoticed(t *testing.T) {
	ours, others := linked()
	var trimmed protoreflect.FileDescriptor
	for _, f := range ours {
		if f.Package() == "inlay.xds.v3" {
			trimmed = f
		}
	}
	if trimmed == nil {
		t.Fatal("the trimmed xDS messages are not linked")
	}
	for name, change := range map[string]struct{ path, pkg string }{
		"the path": {"envoy/config/route/v3/route.proto", "inlay.other.v1"},
		"a name":   {"inlay/other.proto", "envoy.config.route.v3"},
	} {
		t.Run(name, func(t *testing.T) {
			p := protodesc.ToFileDescriptorProto(trimmed)
			old := "." + p.GetPackage() + "."
			p.Name, p.Package = proto.String(change.path), proto.String(change.pkg)
			for _, m := range p.GetMessageType() {
				for _, fd := range m.GetField() {
					if rest, ok := strings.CutPrefix(fd.GetTypeName(), old); ok {
						fd.TypeName = proto.String("." + change.pkg + "." + rest)
					}
				}
				for _, inner := range m.GetNestedType() { // map entries
					for _, fd := range inner.GetField() {
						if rest, ok := strings.CutPrefix(fd.GetTypeName(), old); ok {
							fd.TypeName = proto.String("." + change.pkg + "." + rest)
						}
					}
				}
			}
			f, err := protodesc.NewFile(p, protoregistry.GlobalFiles)
			if err != nil {
				t.Fatal(err)
			}
			if err := registryOf(t, others).RegisterFile(f); err == nil {
				t.Error("registered without an error")
			}
		})
	}
}
