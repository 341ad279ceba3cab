package resource

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// Decoded is one resource that was accepted.
type Decoded struct {
	// Name is the resource's own name.
	Name string
	// Value is *Listener, *RouteConfiguration, *Cluster or *Endpoints.
	Value any
	// NotHonoured lists the fields that this client does not act on, as dotted paths from the
	// resource; a field that the client does not even know by name stands there by number, as in
	// "virtual_hosts[0].routes[2].route.#17". At most maxNotHonoured entries, the last one then
	// says how many more there are.
	NotHonoured []string
}

// maxNotHonoured bounds Decoded.NotHonoured: it travels in status reports.
const maxNotHonoured = 64

// metadataKey is the name under which Inlay's own metadata stands.
const metadataKey = "inlay.dev"

// Decode reads one resource: typeURL and value are those of its google.protobuf.Any. It is a pure
// function and never panics. An error means that the resource is to be rejected (NACK) as a whole;
// a fault inside one route only sets Route.Invalid.
//
// What decides which of the two, or neither: inside a matcher, an action, a TLS context or a
// required filter a field that the trimmed messages of xdspb do not know, an unset oneof and an
// unknown enum value invalidate the element, so that nothing matches more than its author wrote.
// Elsewhere such a field is listed in NotHonoured. Metadata under keys of others is not ours to
// honour and is not listed.
func Decode(typeURL string, value []byte) (Decoded, error) {
	d := decoder{}
	var out Decoded
	var err error
	switch typeURL {
	case ListenerType:
		m := &xdspb.Listener{}
		if err = proto.Unmarshal(value, m); err == nil {
			out.Name = m.GetName()
			out.Value, err = named(m.GetName(), func() (*Listener, error) { return d.listener(m) })
		}
	case RouteType:
		m := &xdspb.RouteConfiguration{}
		if err = proto.Unmarshal(value, m); err == nil {
			out.Name = m.GetName()
			out.Value, err = named(m.GetName(), func() (*RouteConfiguration, error) { return d.routeConfiguration(m, nil) })
		}
	case ClusterType:
		m := &xdspb.Cluster{}
		if err = proto.Unmarshal(value, m); err == nil {
			out.Name = m.GetName()
			out.Value, err = named(m.GetName(), func() (*Cluster, error) { return d.cluster(m) })
		}
	case EndpointsType:
		m := &xdspb.ClusterLoadAssignment{}
		if err = proto.Unmarshal(value, m); err == nil {
			out.Name = m.GetClusterName()
			out.Value, err = named(m.GetClusterName(), func() (*Endpoints, error) { return d.endpoints(m) })
		}
	default:
		return Decoded{}, fmt.Errorf("resource type %q: want %s, %s, %s or %s", typeURL, ListenerType, RouteType, ClusterType, EndpointsType)
	}
	if err != nil {
		// The name goes with the error where it is known: a client says whose update was rejected.
		return Decoded{Name: out.Name}, fmt.Errorf("%s %q: %w", Kind(typeURL), out.Name, err)
	}
	out.NotHonoured = d.report()
	return out, nil
}

// Kind is the field's word for a type URL: "listener", "route configuration", "cluster" or
// "endpoints"; the type URL itself for any other.
func Kind(typeURL string) string {
	switch typeURL {
	case ListenerType:
		return "listener"
	case RouteType:
		return "route configuration"
	case ClusterType:
		return "cluster"
	case EndpointsType:
		return "endpoints"
	}
	return typeURL
}

// InboundListener is the name under which a service asks for the listener of its own port; port
// is the MeshService's.
func InboundListener(namespace, service string, port uint16) string {
	return "inlay/inbound/" + namespace + "/" + service + "/" + strconv.Itoa(int(port))
}

func named[T any](name string, f func() (*T, error)) (any, error) {
	if name == "" {
		return nil, errors.New("the name is empty: want the name it was subscribed by")
	}
	v, err := f()
	if err != nil {
		return nil, err
	}
	return v, nil
}

// decoder gathers what one resource asks for and this client does not do.
type decoder struct {
	notHonoured []string
	more        int
}

// path is where in the resource the decoder is; nil is the resource itself. It is rendered only
// when something is to be said.
type path struct {
	up    *path
	name  string
	index int // -1: not repeated
}

func (p *path) field(name string) *path       { return &path{p, name, -1} }
func (p *path) item(name string, i int) *path { return &path{p, name, i} }

func (p *path) String() string {
	if p == nil {
		return ""
	}
	s := p.name
	if p.index >= 0 {
		s += "[" + strconv.Itoa(p.index) + "]"
	}
	if p.up != nil {
		return p.up.String() + "." + s
	}
	return s
}

// ignored lists the field at p as not honoured.
func (d *decoder) ignored(p *path) {
	if len(d.notHonoured) >= maxNotHonoured-1 {
		d.more++
		return
	}
	d.notHonoured = append(d.notHonoured, p.String())
}

func (d *decoder) report() []string {
	if d.more > 0 {
		return append(d.notHonoured, fmt.Sprintf("and %d more", d.more))
	}
	return d.notHonoured
}

// loose lists the fields of m (not of messages inside it) that nobody here knows.
func (d *decoder) loose(m proto.Message, p *path) {
	for _, num := range unknown(m.ProtoReflect()) {
		d.ignored(p.field("#" + strconv.Itoa(int(num))))
	}
}

// strict is loose for elements where an unknown field changes the meaning: m and all messages
// inside it must hold known fields and enum values only. The fields are listed too, so that the
// status of a client shows them.
func (d *decoder) strict(m proto.Message, p *path) error {
	var errs []error
	d.walk(m.ProtoReflect(), p, &errs)
	return errors.Join(errs...)
}

func (d *decoder) walk(m protoreflect.Message, p *path, errs *[]error) {
	for _, num := range unknown(m) {
		at := p.field("#" + strconv.Itoa(int(num)))
		d.ignored(at)
		*errs = append(*errs, fmt.Errorf("field %s of %s is not honoured by this client", at, m.Descriptor().Name()))
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() { // not Range: its order is random
		fd := fields.Get(i)
		if !m.Has(fd) || fd.IsMap() {
			continue
		}
		name := string(fd.Name())
		switch {
		case fd.Kind() == protoreflect.MessageKind && fd.IsList():
			for j := range m.Get(fd).List().Len() {
				d.walk(m.Get(fd).List().Get(j).Message(), p.item(name, j), errs)
			}
		case fd.Kind() == protoreflect.MessageKind:
			d.walk(m.Get(fd).Message(), p.field(name), errs)
		case fd.Kind() == protoreflect.EnumKind && !fd.IsList():
			if v := m.Get(fd).Enum(); fd.Enum().Values().ByNumber(v) == nil {
				at := p.field(name)
				d.ignored(at)
				*errs = append(*errs, fmt.Errorf("%s: value %d is not known to this client", at, v))
			}
		}
	}
}

// unknown returns the numbers of m's unknown fields, each once, in order of appearance.
func unknown(m protoreflect.Message) []protowire.Number {
	var nums []protowire.Number
	for b := m.GetUnknown(); len(b) > 0; {
		num, _, n := protowire.ConsumeField(b)
		if n < 0 {
			break // cannot be: Unmarshal kept only whole fields
		}
		b = b[n:]
		seen := false
		for _, x := range nums {
			seen = seen || x == num
		}
		if !seen {
			nums = append(nums, num)
		}
	}
	return nums
}

// duration converts a bound. Negative ones and those beyond time.Duration are faults; nil is 0.
func duration(field string, m *durationpb.Duration) (time.Duration, error) {
	if m == nil {
		return 0, nil
	}
	if err := m.CheckValid(); err != nil {
		return 0, fmt.Errorf("%s: %w", field, err)
	}
	if m.GetSeconds() < 0 || m.GetNanos() < 0 {
		return 0, fmt.Errorf("%s: %v is negative: want 0s or more", field, m.AsDuration())
	}
	if m.GetSeconds() > math.MaxInt64/int64(time.Second)-1 {
		return 0, fmt.Errorf("%s: %d s is too long: want at most %d s", field, m.GetSeconds(), math.MaxInt64/int64(time.Second)-1)
	}
	return m.AsDuration(), nil
}

// unpack reads the message of an Any whose type URL the caller has looked at.
func unpack[T proto.Message](a *anypb.Any, m T) (T, error) {
	if err := proto.Unmarshal(a.GetValue(), m); err != nil {
		return m, fmt.Errorf("%s: %w", a.GetTypeUrl(), err)
	}
	return m, nil
}

// texts converts a struct of strings; nil when there is none. Values of other kinds are listed as
// not honoured, in the order of sorted keys.
func (d *decoder) texts(s *structpb.Struct, p *path) map[string]string {
	var out map[string]string
	for _, k := range sortedKeys(s.GetFields()) {
		v, ok := s.GetFields()[k].GetKind().(*structpb.Value_StringValue)
		if !ok {
			d.ignored(p.field(strconv.Quote(k)))
			continue
		}
		if out == nil {
			out = make(map[string]string, len(s.GetFields()))
		}
		out[k] = v.StringValue
	}
	return out
}

// adsSource says whether a config source means this very stream.
func (d *decoder) adsSource(m *xdspb.ConfigSource, p *path) error {
	switch c := m.GetConfigSourceSpecifier().(type) {
	case *xdspb.ConfigSource_Ads:
		d.loose(c.Ads, p.field("ads"))
	case *xdspb.ConfigSource_Self:
		d.loose(c.Self, p.field("self"))
	default:
		return fmt.Errorf("%s: want ads or self, the only source this client reads", p)
	}
	d.loose(m, p)
	return nil
}
