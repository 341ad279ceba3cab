package serve

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// variants are meshes of the services a to d: bit i of the number leaves a service out, the rest
// picks a limit, and for node agents a virtual address and a rule.
var variants = func() (out [32]*xdsgen.Views) {
	for n := range out {
		m := &ir.Mesh{Revision: fmt.Sprint(n), TrustDomain: "inlay.local"}
		for i, name := range []string{"a", "b", "c", "d"} {
			if n&(1<<i) != 0 {
				continue
			}
			c := ir.Cluster{
				Name: name + ".default:1", Namespace: "default", Service: name, Port: 1, MTLS: ir.Permissive, Protocol: ir.GRPC,
				Policy: ir.ClusterPolicy{MaxRequests: uint32(1 + n>>4)},
			}
			m.Services = append(m.Services, ir.Service{Namespace: "default", Name: name, MTLS: ir.Permissive, VirtualAddresses: []netip.Addr{netip.AddrFrom4([4]byte{198, 18, byte(n >> 4), byte(i)})}, Ports: []ir.Port{{
				Number: 1, Protocol: ir.GRPC, Clusters: []ir.Cluster{c},
				Routes: []ir.Route{{Object: "o", Rule: fmt.Sprint(n >> 4), Backends: []ir.Backend{{Cluster: c.Name, Weight: 1}}}},
			}}})
		}
		m.NetworkPolicies = []ir.NetworkPolicy{{
			Namespace: "default", Name: "p", Subject: ir.Selector{Namespace: "default", Labels: map[string]string{"tier": "web"}},
			Ingress: []ir.NetworkRule{{Name: fmt.Sprint(n >> 4), Deny: true}},
		}}
		out[n], _ = xdsgen.New(m, nil)
	}
	return out
}()

var now = time.Unix(0, 0)

// model is a client that does what the protocol asks: it holds what it was sent and did not reject.
type model struct {
	t        *testing.T
	s        *session
	view     xdsgen.View
	delta    bool
	views    *xdsgen.Views
	wants    map[string]map[string]bool   // by type
	holds    map[string]map[string]string // versions by type and name
	queue    []arrival                    // responses under way
	nonce    map[string]string
	rejected map[string]refusal // by type+name
	asked    map[string]int     // delta: subscribed since it was sent last (0), or answered by response n
	excused  map[string]bool    // came or went since it was rejected: may come once more
	sends    int
}

// arrival is the response number n of a stream.
type arrival struct {
	n int
	r any
}

// refusal is a version that was rejected when n responses had been sent: any of these may hold it.
type refusal struct {
	version string
	n       int
}

func newModel(t *testing.T, delta bool) *model {
	return modelOf(t, delta, xdsgen.View{Kind: xdsgen.GRPC, Namespace: "default"})
}

func modelOf(t *testing.T, delta bool, view xdsgen.View) *model {
	m := &model{
		t: t, delta: delta, views: variants[0], view: view,
		wants: map[string]map[string]bool{}, holds: map[string]map[string]string{}, rejected: map[string]refusal{}, asked: map[string]int{}, excused: map[string]bool{},
	}
	m.connect()
	return m
}

func (m *model) connect() {
	m.s = newSession(m.view, m.delta, Config{MaxNames: 1000, MaxResponse: 400})
	m.queue, m.nonce, m.rejected, m.asked = nil, map[string]string{}, map[string]refusal{}, map[string]int{}
	for _, url := range slices.Sorted(maps.Keys(m.wants)) {
		if m.delta {
			if len(m.wants[url]) > 0 {
				m.apply(&discoveryv3.DeltaDiscoveryRequest{
					TypeUrl: url, ResourceNamesSubscribe: slices.Collect(maps.Keys(m.wants[url])), InitialResourceVersions: m.holds[url],
				})
			}
			continue
		}
		if len(m.wants[url]) > 0 {
			m.say(url, "")
		}
	}
}

func (m *model) apply(r *discoveryv3.DeltaDiscoveryRequest) {
	if _, err := m.s.applyDelta(r, now); err != nil {
		m.t.Fatal(err)
	}
}

// say sends the full list of a type, as state-of-the-world has it.
func (m *model) say(url, nack string) {
	r := &discoveryv3.DiscoveryRequest{
		TypeUrl: url, ResourceNames: slices.Collect(maps.Keys(m.wants[url])), ResponseNonce: m.nonce[url],
	}
	if nack != "" {
		r.ErrorDetail = &rpcstatus.Status{Message: nack}
	}
	if _, err := m.s.applySotW(r, now); err != nil {
		m.t.Fatal(err)
	}
}

func (m *model) subscribe(url, name string) {
	if m.wants[url] == nil {
		m.wants[url], m.holds[url] = map[string]bool{}, map[string]string{}
	}
	if m.delta && name != "*" {
		m.forgive(url, name)
		m.asked[url+name] = 0
	}
	m.wants[url][name] = true
	if m.delta {
		m.apply(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: []string{name}})
		return
	}
	m.say(url, "")
}

func (m *model) unsubscribe(url, name string) {
	if !m.wants[url][name] {
		return
	}
	delete(m.wants[url], name)
	for n := range m.s.types[url].subs {
		if !m.wants[url]["*"] && !m.wants[url][n] {
			m.forgive(url, n)
		}
	}
	maps.DeleteFunc(m.holds[url], func(n, _ string) bool { return !m.wants[url]["*"] && !m.wants[url][n] })
	if m.delta {
		m.apply(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesUnsubscribe: []string{name}})
		return
	}
	m.say(url, "")
}

func (m *model) publish(v *xdsgen.Views) {
	for _, k := range v.Changed(m.views) {
		if k.Kind == m.view.Kind {
			m.s.touch(k.Type, k.Name)
			before, _ := m.views.Lookup(m.view, k.Type, k.Name)
			after, _ := v.Lookup(m.view, k.Type, k.Name)
			m.excused[k.Type+k.Name] = m.excused[k.Type+k.Name] || before == nil || after == nil
		}
	}
	m.views = v
}

// deliver takes what is due and returns how many responses that were.
func (m *model) deliver() int {
	before := m.sends
	add := func(r any) {
		m.sends++
		m.queue = append(m.queue, arrival{m.sends, r})
	}
	if m.delta {
		for _, r := range m.s.planDelta(m.views, now) {
			add(r)
			for _, x := range r.Resources {
				if n, ok := m.asked[r.TypeUrl+x.Name]; ok && n == 0 {
					m.asked[r.TypeUrl+x.Name] = m.sends
				}
			}
		}
	} else {
		for _, r := range m.s.planSotW(m.views, now) {
			add(r)
		}
	}
	return m.sends - before
}

// answer takes the oldest response; reject refuses its first resource.
func (m *model) answer(reject bool) {
	if len(m.queue) == 0 {
		return
	}
	next := m.queue[0]
	m.queue = m.queue[1:]
	switch r := next.r.(type) {
	case *discoveryv3.DeltaDiscoveryResponse:
		nack := ""
		for i, x := range r.Resources {
			if reject && i == 0 {
				nack = x.Name + ": refused"
				m.refuse(next.n, r.TypeUrl, x.Name, x.Version)
				continue
			}
			m.hold(r.TypeUrl, x.Name, x.Version)
		}
		for _, name := range r.RemovedResources {
			delete(m.holds[r.TypeUrl], name)
		}
		req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
		if nack != "" {
			req.ErrorDetail = &rpcstatus.Status{Message: nack}
		}
		m.apply(req)
	case *discoveryv3.DiscoveryResponse:
		m.nonce[r.TypeUrl] = r.Nonce
		nack, there := "", map[string]bool{}
		for i, a := range r.Resources {
			name, version := m.read(r.TypeUrl, a)
			there[name] = true
			if reject && i == 0 && m.holds[r.TypeUrl][name] != version {
				nack = name + ": refused"
				m.refuse(next.n, r.TypeUrl, name, version)
				continue
			}
			m.hold(r.TypeUrl, name, version)
		}
		if whole(r.TypeUrl) {
			maps.DeleteFunc(m.holds[r.TypeUrl], func(n, _ string) bool { return !there[n] })
		}
		m.say(r.TypeUrl, nack)
	}
}

func (m *model) refuse(n int, url, name, version string) {
	if was := m.rejected[url+name]; was.version == version && n > was.n && m.asked[url+name] != n && !m.excused[url+name] {
		m.t.Errorf("%s %q: version %s was rejected and sent again", url, name, version)
	}
	delete(m.excused, url+name)
	if m.wants[url][name] || m.wants[url]["*"] {
		m.rejected[url+name] = refusal{version, m.sends}
	}
}

// forgive notes that a name may come again in a version that was rejected: the client asked anew.
func (m *model) forgive(url, name string) {
	delete(m.rejected, url+name)
}

func (m *model) hold(url, name, version string) {
	if !m.delta && m.holds[url][name] == version {
		return // what it kept when it rejected another one
	}
	delete(m.rejected, url+name)
	if m.wants[url][name] || m.wants[url]["*"] {
		m.holds[url][name] = version
	}
}

// read finds which resource of any mesh these bytes are.
func (m *model) read(url string, a *anypb.Any) (name, version string) {
	for _, v := range variants {
		for name, r := range v.Set(m.view).Resources[url] {
			if string(r.Any.Value) == string(a.Value) {
				return name, r.Version
			}
		}
	}
	for _, v := range variants {
		for name := range m.wants[url] {
			if r, _ := v.Lookup(m.view, url, name); r != nil && string(r.Any.Value) == string(a.Value) {
				return name, r.Version
			}
		}
	}
	m.t.Fatalf("%s: a resource of no mesh", url)
	return "", ""
}

// check compares the client with the mesh once everything has been delivered and accepted.
func (m *model) check() {
	for i := 0; m.deliver() > 0 || len(m.queue) > 0; i++ {
		if i > 50 {
			m.t.Fatal("never at rest: something is sent again and again")
		}
		for len(m.queue) > 0 {
			m.answer(false)
		}
	}
	names := 0
	for url, wants := range m.wants {
		all := m.views.Set(m.view).Resources[url]
		expect := map[string]string{}
		for name, r := range all {
			if wants[name] || wants["*"] {
				expect[name] = r.Version
			}
		}
		for name := range wants { // some are made for who asks by name
			if r, _ := m.views.Lookup(m.view, url, name); r != nil {
				expect[name] = r.Version
			}
		}
		for name, version := range expect {
			if m.rejected[url+name].version != version && m.holds[url][name] != version {
				m.t.Errorf("%s %q: the client holds %q, want %q", url, name, m.holds[url][name], version)
			}
		}
		for name := range m.holds[url] {
			if _, ok := expect[name]; !ok && (m.delta || whole(url)) {
				m.t.Errorf("%s %q: the client still holds what is gone", url, name)
			}
		}
		if t := m.s.types[url]; t != nil {
			names += len(t.subs)
			if len(t.inflight) > 0 || t.flown != 0 {
				m.t.Errorf("%s: %d responses under way at rest", url, len(t.inflight))
			}
		}
	}
	if names != m.s.names {
		m.t.Errorf("%d subscriptions counted, want %d", m.s.names, names)
	}
	if state := m.s.summary(); state == statePending {
		m.t.Errorf("state %s at rest", state)
	}
}

// FuzzConversation lets a client do anything that the protocol allows, in any order, and checks
// that it ends with what the mesh has, and that nothing rejected came twice.
func FuzzConversation(f *testing.F) {
	for _, seed := range []string{
		"", "\x00\x00\x04\x01\x05\x00", "\x00\x20\x04\x02\x05\x02\x06\x00\x03\x0f\x04\x00\x05\x01",
		"\x00\x00\x00\x05\x00\x0a\x04\x00\x06\x00\x03\x11\x04\x00\x06\x00\x03\x01\x07\x00\x04\x00",
		"\x02\x00\x04\x00\x03\x0f\x05\x00\x04\x00\x02\x01\x03\x10\x04\x00\x05\x00",
	} {
		for _, node := range []bool{true, false} {
			f.Add([]byte(seed), true, node)
			f.Add([]byte(seed), false, node)
		}
	}
	// A name is unsubscribed while its response is under way, then the wildcard covers it, and it goes.
	f.Add([]byte("02$0227BC7"), true, false)
	// A node agent: all services, the policies of a service that nobody knows, a change, an answer of each kind.
	f.Add([]byte("\x07\x04\x00\x11\x04\x00\x05\x00\x03\x11\x04\x00\x06\x00\x03\x01\x04\x00\x05\x00"), true, true)
	types := []string{xdsgen.ClusterType, xdsgen.EndpointsType, xdsgen.ListenerType, xdsgen.RouteType}
	f.Fuzz(func(t *testing.T, script []byte, delta, node bool) {
		if len(script) > 200 {
			t.Skip("long enough")
		}
		m := newModel(t, delta)
		if node {
			m = modelOf(t, delta, xdsgen.View{Kind: xdsgen.Node})
		}
		for i := 0; i+1 < len(script); i += 2 {
			arg := int(script[i+1])
			url := types[arg%4]
			name := string(rune('a'+arg/4%5)) + ".default:1" // "e" never exists
			all := whole(url)
			if node {
				url = []string{xdsgen.NodeServiceType, xdsgen.NodePoliciesType, xdsgen.ClusterType, xdsgen.NodePoliciesType}[arg%4]
				name = "default/" + string(rune('a'+arg/4%5)) // of "e" there are policies all the same
				all = delta && url == xdsgen.NodeServiceType
			}
			switch script[i] % 8 {
			case 0, 1:
				m.subscribe(url, name)
			case 2:
				m.unsubscribe(url, name)
			case 3:
				m.publish(variants[arg%len(variants)])
			case 4:
				m.deliver()
			case 5:
				m.answer(false)
			case 6:
				m.answer(true)
			case 7:
				switch arg / 4 % 3 {
				case 0:
					m.connect()
				case 1:
					if all && (delta || len(m.wants[url]) > 0) {
						m.subscribe(url, "*")
					}
				case 2:
					m.unsubscribe(url, "*")
				}
			}
		}
		m.check()
	})
}

func TestARejectionBlamesTheNamesInItsText(t *testing.T) {
	for name, tc := range map[string]struct {
		text  string
		names []string
		want  []string
	}{
		"the one named":                  {`cluster "b.x:1": bad`, []string{"a.x:1", "b.x:1"}, []string{"b.x:1"}},
		"a name before a colon":          {"orders: bad", []string{"orders", "cart"}, []string{"orders"}},
		"a name at a sentence's end":     {"cannot take orders.", []string{"orders", "cart"}, []string{"orders"}},
		"not a name within a longer one": {"orders.shop:80 is bad", []string{"orders", "orders.shop:80", "orders.shop:8080"}, []string{"orders.shop:80"}},
		"a version's name":               {"bad: orders.shop:80|v1", []string{"orders.shop:80", "orders.shop:80|v1"}, []string{"orders.shop:80|v1"}},
		"all when it names none":         {"bad", []string{"a", "b"}, []string{"a", "b"}},
		"all when it is empty":           {"", []string{"a", "b"}, []string{"a", "b"}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := slices.Sorted(maps.Keys(blamed(tc.text, tc.names))); !slices.Equal(got, tc.want) {
				t.Errorf("blamed %q, want %q", got, tc.want)
			}
		})
	}
}

// The record of responses stays bounded by the subscriptions for a client that answers none.
func TestAClientThatNeverAnswersCostsNoMemory(t *testing.T) {
	m := newModel(t, true)
	for _, name := range []string{"a.default:1", "b.default:1"} {
		m.subscribe(xdsgen.ClusterType, name)
	}
	for i := range 10_000 {
		m.publish(variants[(i%2)<<4])
		m.deliver()
		m.queue = nil
	}
	st := m.s.types[xdsgen.ClusterType]
	if m.sends < 10_000 || len(st.inflight) > 100 || cap(st.inflight) > 1000 {
		t.Errorf("%d responses recorded of %d sent (capacity %d), want at most 100", len(st.inflight), m.sends, cap(st.inflight))
	}
}
