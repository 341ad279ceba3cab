package differential

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/inlay-mesh/inlay/xds/resource"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// care is what ARCHITECTURE, decision 4, says of a field that the trimmed messages do not know.
type care int

const (
	listed      care = iota // the resource is taken as it is, the field in NotHonoured
	invalidates             // the route with it is never taken
	rejects                 // the resource is refused
)

// cares says it by the message that the field is in. "Inside a matcher, action, RBAC rule, TLS
// context or required filter an unknown field, unset oneof or unknown enum invalidates the element
// as the gRFC says (else NACKs the resource)". What is inside inherits, unless it says otherwise.
var cares = map[protoreflect.FullName]care{
	"envoy.config.route.v3.RouteMatch":                                                      invalidates,
	"envoy.config.route.v3.RouteAction":                                                     invalidates,
	"envoy.config.route.v3.RouteAction.MaxStreamDuration":                                   listed, // a bound, no choice
	"envoy.config.route.v3.RetryPolicy":                                                     listed, // gRFC A44: "We ignore all other attributes in Envoy RetryPolicy."
	"envoy.config.route.v3.NonForwardingAction":                                             invalidates,
	"envoy.config.core.v3.TransportSocket":                                                  rejects,
	"envoy.config.cluster.v3.Cluster.TransportSocketMatch":                                  rejects,
	"envoy.config.listener.v3.FilterChainMatch":                                             rejects,
	"envoy.config.listener.v3.Filter":                                                       rejects,
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager":     listed,
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter":                rejects,
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.#19": rejects, // gRFC A41, xff_num_trusted_hops
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.#46": rejects, // gRFC A41, original_ip_detection_extensions
}

// trimmedIn are the messages inside an Any, as the SDK reads them.
var trimmedIn = map[protoreflect.FullName]proto.Message{
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager": &xdspb.HttpConnectionManager{},
	"envoy.extensions.filters.http.router.v3.Router":                                    &xdspb.Router{},
	"envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer":                        &xdspb.Router{}, // as empty
	"envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext":                      &xdspb.UpstreamTlsContext{},
	"envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext":                    &xdspb.DownstreamTlsContext{},
	"envoy.extensions.upstreams.http.v3.HttpProtocolOptions":                            &xdspb.UpstreamHttpProtocolOptions{},
}

var trimmedOf = map[string]proto.Message{
	resource.ListenerType: &xdspb.Listener{}, resource.RouteType: &xdspb.RouteConfiguration{},
	resource.ClusterType: &xdspb.Cluster{}, resource.EndpointsType: &xdspb.ClusterLoadAssignment{},
}

// site is a field of Envoy's that the trimmed message lacks, somewhere in a resource.
type site struct {
	message protoreflect.Message
	field   protoreflect.FieldDescriptor
	care    care
}

// replaces says whether setting the field unsets one that is honoured.
func (s site) replaces() bool {
	o := s.field.ContainingOneof()
	return o != nil && !o.IsSynthetic() && s.message.WhichOneof(o) != nil
}

// walker finds the sites of a resource in order; visit may change the message of a site.
type walker struct {
	t     *testing.T
	visit func(site)
}

func (w walker) walk(m protoreflect.Message, trimmed protoreflect.MessageDescriptor, c care) {
	name := m.Descriptor().FullName()
	if own, ok := cares[name]; ok {
		c = own
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		known := trimmed.Fields().ByNumber(fd.Number())
		if known == nil {
			at := c
			if own, ok := cares[protoreflect.FullName(fmt.Sprintf("%s.#%d", name, fd.Number()))]; ok {
				at = own
			}
			w.visit(site{m, fd, at})
			continue
		}
		if fd.Message() == nil || !m.Has(fd) {
			continue
		}
		switch {
		case fd.IsMap():
			if fd.MapValue().Message() == nil {
				continue
			}
			m.Get(fd).Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
				w.child(v.Message(), known.MapValue().Message(), c)
				return true
			})
		case fd.IsList():
			for j := range m.Get(fd).List().Len() {
				w.child(m.Get(fd).List().Get(j).Message(), known.Message(), c)
			}
		default:
			w.child(m.Get(fd).Message(), known.Message(), c)
		}
	}
}

func (w walker) child(m protoreflect.Message, trimmed protoreflect.MessageDescriptor, c care) {
	a, isAny := m.Interface().(*anypb.Any)
	switch {
	case isAny:
		inner, err := a.UnmarshalNew()
		if err != nil {
			w.t.Fatal(err)
		}
		t := trimmedIn[inner.ProtoReflect().Descriptor().FullName()]
		if t == nil {
			w.t.Fatalf("%s: not known to this test", a.GetTypeUrl())
		}
		w.walk(inner.ProtoReflect(), t.ProtoReflect().Descriptor(), c)
		if err := a.MarshalFrom(inner); err != nil {
			w.t.Fatal(err)
		}
	case strings.HasPrefix(string(m.Descriptor().FullName()), "google.protobuf."):
	default:
		w.walk(m, trimmed, c)
	}
}

// fill sets a field to something random that is not its default, and says whether there is such a
// thing.
func (g maker) fill(m protoreflect.Message, fd protoreflect.FieldDescriptor, depth int) bool {
	switch {
	case fd.IsMap():
		v := m.Mutable(fd).Map().NewValue()
		if fd.MapValue().Message() == nil {
			v = g.scalar(fd.MapValue())
		}
		m.Mutable(fd).Map().Set(g.scalar(fd.MapKey()).MapKey(), v)
	case fd.IsList() && fd.Message() != nil:
		g.inside(m.Mutable(fd).List().AppendMutable().Message(), depth)
	case fd.IsList():
		m.Mutable(fd).List().Append(g.scalar(fd))
	case fd.Message() != nil:
		g.inside(m.Mutable(fd).Message(), depth)
	case fd.Kind() == protoreflect.EnumKind && fd.Enum().Values().Len() == 1:
		return false
	default:
		m.Set(fd, g.scalar(fd))
	}
	return true
}

// inside fills some fields of a message.
func (g maker) inside(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	if depth == 0 || fields.Len() == 0 || strings.HasPrefix(string(m.Descriptor().FullName()), "google.protobuf.") {
		return
	}
	for range g.IntN(4) {
		g.fill(m, fields.Get(g.IntN(fields.Len())), depth-1)
	}
}

func (g maker) scalar(fd protoreflect.FieldDescriptor) protoreflect.Value {
	n := 1 + g.IntN(99)
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		values := fd.Enum().Values()
		return protoreflect.ValueOfEnum(values.Get(min(1, values.Len()-1) + g.IntN(max(1, values.Len()-1))).Number())
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(n))
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(int64(n))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(uint64(n))
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(float32(n))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(float64(n))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte("b"))
	default:
		return protoreflect.ValueOfString(g.name("s"))
	}
}

// TestOtherFields: each field of Envoy's messages that the trimmed ones lack, at each place of
// random resources, is listed, invalidates its route or rejects the resource, as its place demands;
// and where it is listed the value is what it was without it. Nothing is dropped in silence.
func TestOtherFields(t *testing.T) {
	g := maker{seeded(t), t}
	tried, valid, byCare := 0, 0, map[care]int{}
	fields := map[string]bool{}
	for range 5 {
		all := g.samples()
		for _, typeURL := range slices.Sorted(maps.Keys(all)) { // so that the seed says all
			s := all[typeURL]
			trimmed := trimmedOf[typeURL].ProtoReflect().Descriptor()
			total := 0
			walker{t, func(site) { total++ }}.walk(proto.Clone(s.envoy).ProtoReflect(), trimmed, listed)
			for want := range total {
				m := proto.Clone(s.envoy)
				var at site
				set, replaces, i := false, false, 0
				walker{t, func(st site) {
					if i == want {
						at, replaces = st, st.replaces()
						set = g.fill(st.message, st.field, 2)
					}
					i++
				}}.walk(m.ProtoReflect(), trimmed, listed)
				if !set || unweighted(at) {
					continue
				}
				tried++
				byCare[at.care]++
				fields[string(at.field.FullName())] = true
				if m.(interface{ Validate() error }).Validate() == nil {
					valid++
				}
				if why := judge(typeURL, g.marshal(m), s, at, replaces); why != "" {
					t.Errorf("%s #%d: %s\n%v", at.field.FullName(), at.field.Number(), why, m)
				}
			}
		}
	}
	t.Logf("%d settings of %d fields (%d of them valid by Envoy's rules): %d listed, %d invalidate a route, %d reject",
		tried, len(fields), valid, byCare[listed], byCare[invalidates], byCare[rejects])
	if len(fields) < 250 || byCare[invalidates] == 0 || byCare[rejects] == 0 {
		t.Errorf("%d fields tried, %v by care: the walk does not reach what it should", len(fields), byCare)
	}
}

// unweighted says whether a site is in the sample's locality without weight, which is skipped whole
// (gRFC A27).
func unweighted(at site) bool {
	m := at.message
	if m.Descriptor().Name() == "Locality" {
		return m.Get(m.Descriptor().Fields().ByName("region")).String() == "skipped"
	}
	if m.Descriptor().Name() != "LocalityLbEndpoints" {
		return false
	}
	return !m.Has(m.Descriptor().Fields().ByName("load_balancing_weight"))
}

// judge says what is wrong with how a resource with one more field was decoded; empty for nothing.
func judge(typeURL string, raw []byte, s sample, at site, replaces bool) string {
	d, err := resource.Decode(typeURL, raw)
	if at.care == rejects {
		if err == nil {
			return "was accepted, want the resource rejected"
		}
		return ""
	}
	if err != nil {
		if replaces {
			return "" // an unset oneof may be more than the element's fault
		}
		return fmt.Sprintf("rejected the resource: %v", err)
	}
	number := fmt.Sprintf("#%d", at.field.Number())
	told := false
	for _, p := range d.NotHonoured {
		told = told || strings.HasSuffix(p, number)
	}
	if !told {
		return fmt.Sprintf("is not in %q", d.NotHonoured)
	}
	before, after := invalid(s.value), invalid(d.Value)
	switch {
	case at.care == invalidates && after != before+1:
		return fmt.Sprintf("%d routes are invalid, want %d", after, before+1)
	case at.care == listed && !replaces && !reflect.DeepEqual(d.Value, s.value):
		return fmt.Sprintf("changed the value to %+v, want %+v", d.Value, s.value)
	}
	return ""
}

// invalid counts the routes that are never taken.
func invalid(v any) int {
	n := 0
	count := func(rc *resource.RouteConfiguration) {
		if rc == nil {
			return
		}
		for _, vh := range rc.VirtualHosts {
			for _, r := range vh.Routes {
				if r.Invalid != "" {
					n++
				}
			}
		}
	}
	switch v := v.(type) {
	case *resource.RouteConfiguration:
		count(v)
	case *resource.Listener:
		if v.API != nil {
			count(v.API.Inline)
		}
		for _, c := range v.Chains {
			count(c.HTTP.Inline)
		}
	}
	return n
}
