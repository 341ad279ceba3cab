package serve

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strconv"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// change is what a type's client lacks.
type change struct {
	t       *typeState
	updates []*xdsgen.Resource // by name
	removed []string           // by name
	answer  bool
}

func (c *change) empty() bool { return len(c.updates)+len(c.removed) == 0 && !c.answer }

// order is make before break (xDS protocol, "Eventual consistency considerations"): what is
// pointed at before what points.
var order = []string{xdsgen.ClusterType, xdsgen.EndpointsType, xdsgen.ListenerType, xdsgen.RouteType}

// changes looks at everything that is marked, against one mesh, so that all responses of one plan
// agree with each other. Only the newest mesh is ever looked at: a client that reads slowly misses
// what was replaced in between, and nothing queues up.
func (s *session) changes(views *xdsgen.Views) []*change {
	urls := slices.Clone(order)
	for _, url := range slices.Sorted(maps.Keys(s.types)) {
		if !slices.Contains(order, url) {
			urls = append(urls, url)
		}
	}
	out := make([]*change, 0, len(urls))
	for _, url := range urls {
		t := s.types[url]
		if t == nil || len(t.dirty) == 0 && !t.expand && !t.answer {
			continue
		}
		if t.expand {
			t.expand = false
			for name := range views.Set(s.view).Resources[url] {
				t.dirty[name] = t.dirty[name] || false
			}
		}
		c := &change{t: t, answer: t.answer}
		t.answer = false
		for _, name := range slices.Sorted(maps.Keys(t.dirty)) {
			s.look(c, name, t.dirty[name], views)
		}
		clear(t.dirty)
		if !c.empty() {
			out = append(out, c)
		}
	}
	return out
}

// look compares what a client should have under one name with what it has.
func (s *session) look(c *change, name string, force bool, views *xdsgen.Views) {
	u := c.t.subs[name]
	target, withheld := views.Lookup(s.view, c.t.url, name)
	if u == nil {
		if target == nil || !c.t.wildcard {
			return
		}
		u = &sub{}
		c.t.subs[name] = u
		s.names++
	}
	u.withheld = withheld
	switch {
	case target == nil && !u.explicit && u.sent == nil && u.claimed == "":
		s.forget(c.t, name)
	case target == nil:
		if !u.absent || force {
			c.removed = append(c.removed, name)
		}
	case force:
		c.updates = append(c.updates, target)
	case versionOf(u.sent) == target.Version:
	case u.rejected == target.Version:
		// Held back: it is sent again when it changes, not before.
	case u.sent == nil && !u.absent && u.claimed == target.Version:
		u.sent, u.acked, u.claimed = target, target, "" // initial_resource_versions: it has this one
	case u.rejected != "" && !u.pending && versionOf(u.acked) == target.Version:
		u.sent, u.rejected, u.nack = target, "", "" // back to what the client kept all the time
	default:
		c.updates = append(c.updates, target)
	}
}

// gave notes that a name went out in a response; r is nil for the word that there is none.
func (t *typeState) gave(name string, r *xdsgen.Resource, nonce uint64, now time.Time) {
	u := t.subs[name]
	u.sent, u.absent, u.sentNonce, u.pending, u.changed = r, r == nil, nonce, true, now
	u.rejected, u.nack = "", ""
}

// planDelta returns the responses that bring the client up to date, in order.
func (s *session) planDelta(views *xdsgen.Views, now time.Time) []*discoveryv3.DeltaDiscoveryResponse {
	var out []*discoveryv3.DeltaDiscoveryResponse
	changes := s.changes(views)
	for _, c := range changes {
		removed := c.removed
		if c.t.url == xdsgen.ClusterType || c.t.url == xdsgen.EndpointsType {
			removed = nil // once nothing points at them
		}
		if len(c.updates)+len(removed) > 0 || c.answer && len(c.removed) == 0 {
			out = append(out, s.deltaResponses(c.t, c.updates, removed, now)...)
		}
	}
	for _, c := range changes {
		if (c.t.url == xdsgen.ClusterType || c.t.url == xdsgen.EndpointsType) && len(c.removed) > 0 {
			out = append(out, s.deltaResponses(c.t, nil, c.removed, now)...)
		}
	}
	return out
}

// deltaResponses splits one type's changes into responses of bounded size.
func (s *session) deltaResponses(t *typeState, updates []*xdsgen.Resource, removed []string, now time.Time) []*discoveryv3.DeltaDiscoveryResponse {
	var out []*discoveryv3.DeltaDiscoveryResponse
	for first := true; first || len(updates)+len(removed) > 0; first = false {
		s.nonce++
		resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: t.url, Nonce: strconv.FormatUint(s.nonce, 10)}
		var names []string
		size := 0
		for len(updates) > 0 && (len(names) == 0 || size+wireSize(updates[0]) <= s.size) {
			r := updates[0]
			updates = updates[1:]
			size += wireSize(r)
			names = append(names, r.Name)
			resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: r.Name, Version: r.Version, Resource: r.Any})
			t.gave(r.Name, r, s.nonce, now)
		}
		for len(updates) == 0 && len(removed) > 0 && (len(names) == 0 || size+len(removed[0]) <= s.size) {
			name := removed[0]
			removed = removed[1:]
			size += len(name)
			names = append(names, name)
			resp.RemovedResources = append(resp.RemovedResources, name)
			t.gave(name, nil, s.nonce, now)
			if !t.subs[name].explicit {
				s.forget(t, name) // only the wildcard had it
			}
		}
		t.flew(s.nonce, names)
		out = append(out, resp)
	}
	return out
}

// wireSize is about what a resource takes in a response.
func wireSize(r *xdsgen.Resource) int {
	return len(r.Any.Value) + len(r.Any.TypeUrl) + len(r.Name) + 48
}

// planSotW is planDelta for state-of-the-world.
func (s *session) planSotW(views *xdsgen.Views, now time.Time) []*discoveryv3.DiscoveryResponse {
	changes := s.changes(views)
	pointing := slices.ContainsFunc(changes, func(c *change) bool {
		return (c.t.url == xdsgen.ListenerType || c.t.url == xdsgen.RouteType) && !c.empty()
	})
	var out, late []*discoveryv3.DiscoveryResponse
	for _, c := range changes {
		switch {
		case !whole(c.t.url):
			out = append(out, s.partResponses(c, now)...)
		case c.t.url == xdsgen.ClusterType && pointing && c.breaks():
			// The clusters that go stay until the routes to them have gone.
			if len(c.updates) > 0 {
				out = append(out, s.wholeResponse(&change{t: c.t, updates: c.updates}, now))
			}
			late = append(late, s.wholeResponse(&change{t: c.t, removed: c.removed}, now))
		default:
			out = append(out, s.wholeResponse(c, now))
		}
	}
	return append(out, late...)
}

// breaks says whether the client loses something that it has.
func (c *change) breaks() bool {
	return slices.ContainsFunc(c.removed, func(n string) bool { return c.t.subs[n].sent != nil })
}

// wholeResponse holds everything of a type that the client subscribed to and that exists.
func (s *session) wholeResponse(c *change, now time.Time) *discoveryv3.DiscoveryResponse {
	t := c.t
	s.nonce++
	var flown []string
	for _, r := range c.updates {
		t.gave(r.Name, r, s.nonce, now)
		flown = append(flown, r.Name)
	}
	for _, name := range c.removed {
		t.gave(name, nil, s.nonce, now)
		flown = append(flown, name)
		if !t.subs[name].explicit {
			s.forget(t, name)
		}
	}
	var all []*xdsgen.Resource
	for _, name := range slices.Sorted(maps.Keys(t.subs)) {
		u := t.subs[name]
		r := u.sent
		if u.rejected != "" {
			r = u.acked // the client kept it; leaving it out would remove it
		}
		if r == nil {
			continue
		}
		if u.pending && u.sentNonce != s.nonce {
			u.sentNonce = s.nonce // this response stands for the earlier one too
			flown = append(flown, name)
		}
		all = append(all, r)
	}
	t.flew(s.nonce, flown)
	return s.sotwResponse(t, all)
}

// partResponses holds only what changed, in responses of bounded size. A removal cannot be told:
// the client learns it from the listener or cluster that no longer names the resource.
func (s *session) partResponses(c *change, now time.Time) []*discoveryv3.DiscoveryResponse {
	t := c.t
	for _, name := range c.removed {
		u := t.subs[name]
		u.sent, u.absent, u.pending, u.changed = nil, true, false, now
		u.rejected, u.nack = "", ""
	}
	var out []*discoveryv3.DiscoveryResponse
	for updates := c.updates; len(updates) > 0; {
		n, size := 0, 0
		var flown []string
		s.nonce++
		for n < len(updates) && (n == 0 || size+wireSize(updates[n]) <= s.size) {
			size += wireSize(updates[n])
			t.gave(updates[n].Name, updates[n], s.nonce, now)
			flown = append(flown, updates[n].Name)
			n++
		}
		t.flew(s.nonce, flown)
		out = append(out, s.sotwResponse(t, updates[:n]))
		updates = updates[n:]
	}
	return out
}

// sotwResponse encodes nothing: it lists what xdsgen encoded. The version is one of the whole
// response, a hash of the names and versions in it.
func (s *session) sotwResponse(t *typeState, resources []*xdsgen.Resource) *discoveryv3.DiscoveryResponse {
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: t.url, Nonce: strconv.FormatUint(s.nonce, 10)}
	h := sha256.New()
	for _, r := range resources {
		resp.Resources = append(resp.Resources, r.Any)
		h.Write([]byte(r.Name + "\x00" + r.Version + "\x00"))
	}
	resp.VersionInfo = hex.EncodeToString(h.Sum(nil)[:8])
	if resp.Resources == nil {
		resp.Resources = []*anypb.Any{}
	}
	return resp
}
