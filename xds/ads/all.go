package ads

import (
	"errors"
	"iter"
	"maps"
	"slices"
)

// wildcard is the name that stands for every resource of a type.
const wildcard = "*"

// probe is asked for by name to learn when a wildcard has been answered. No resource is called
// so. It sorts behind every name that can exist, since servers that answer several names at once
// do so in their order.
const probe = "~synced"

// maxClaims bounds what initial_resource_versions takes in one request, in bytes: gRPC servers
// refuse messages of more than 4 MiB unless told otherwise. What is not claimed is sent again.
const maxClaims = 3 << 20

var errNoWildcard = errors.New("the server speaks state of the world only, and everything of a type is asked for by incremental xDS: want a control plane that serves DeltaAggregatedResources")

// everything is the wildcard subscription of a type.
//
// Incremental xDS does not say when a wildcard has been answered whole: the answer may take several
// responses. So once the first of them has come, a name that does not exist is asked for, and its
// answer is the mark. A stream keeps its order, the first response shows that the server has begun to
// answer, and a server that plans its answer at once (ours does) sends all of it before it looks at
// the next request. A server that is silent about what does not exist is waited for as long as for
// any name, by the resource timer. One that never answered the wildcard itself is never taken as
// synced: silence is no word on what exists.
type everything struct {
	wanted  bool
	asked   bool // on this stream
	probing bool // the probe is among the entries
	synced  bool // on this stream
	refused bool // it was said that this stream cannot
}

func (m *Machine) subscribeAll(e SubscribeAll) {
	t := m.state(e.Type)
	if !t.all.wanted {
		t.all.wanted, t.dirty = true, true
	}
	for name, version := range e.Held {
		if t.entries[name] == nil {
			t.entries[name] = &entry{version: version, known: true, covered: true}
		}
	}
}

func (m *Machine) unsubscribeAll(url string) []Action {
	t := m.types[url]
	if t == nil || !t.all.wanted {
		return nil
	}
	var out []Action
	if t.all.probing {
		out = t.stop(out, probe)
	}
	t.endAll()
	t.all.wanted, t.dirty = false, true
	maps.DeleteFunc(t.entries, func(_ string, e *entry) bool { return e.covered })
	return out
}

// endAll forgets how far the wildcard was answered on the stream.
func (t *typeState) endAll() {
	if t.all.probing {
		delete(t.entries, probe)
	}
	t.all = everything{wanted: t.all.wanted}
}

// refuseAll tells once a stream that a wildcard cannot be had.
func (t *typeState) refuseAll(out []Action) []Action {
	if !t.all.wanted || t.all.refused {
		return out
	}
	t.all.refused = true
	return append(out, Deliver{Update{Name: Name{t.url, wildcard}, Received: Received{Name: wildcard, Err: errNoWildcard}}})
}

// named says whether anything is asked for by its name.
func (t *typeState) named() bool {
	for _, e := range t.entries {
		if !e.covered {
			return true
		}
	}
	return false
}

// claims are the versions of what is held because everything is wanted, for the first request of a
// stream.
//
// DeltaDiscoveryRequest.initial_resource_versions: "Informs the server of the versions of the
// resources the xDS client knows of, to enable the client to continue the same logical xDS session
// even in the face of gRPC stream failure."
func (t *typeState) claims() map[string]string {
	if t.opened {
		return nil
	}
	var out map[string]string
	size := 0
	for name, e := range t.entries {
		if !e.covered || e.version == "" {
			continue
		}
		if size += len(name) + len(e.version) + 12; size > maxClaims {
			break
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = e.version
		e.told = true
	}
	return out
}

// probe asks for the mark.
func (t *typeState) probe() {
	t.entries[probe] = &entry{}
	t.all.probing, t.dirty = true, true
}

// sync is the moment when the wildcard has been answered whole. What is held and the server neither
// was told of nor spoke of is not there.
func (t *typeState) sync(out []Action) []Action {
	out = t.stop(out, probe)
	delete(t.entries, probe)
	t.all.probing, t.all.synced, t.dirty = false, true, true
	var lost []string
	for name, e := range t.entries {
		if e.covered && !e.told {
			lost = append(lost, name)
		}
	}
	slices.Sort(lost)
	for _, name := range lost {
		out = t.gone(out, name, t.entries[name])
	}
	return append(out, Deliver{Update{Name: Name{t.url, wildcard}, Received: Received{Name: wildcard}, Synced: true}})
}

// covered are the names that are held because everything is wanted.
func (m *Machine) covered() map[string][]string {
	out := map[string][]string{}
	for url, t := range m.types {
		for name, e := range t.entries {
			if e.covered && e.known {
				out[url] = append(out[url], name)
			}
		}
	}
	return out
}

// SubscribeAll asks for every resource of a type. held are the values that the caller has, from a
// cache, with the server's version of each. What is there is delivered under its own name, then
// Synced under the name "*", again after each reconnection.
func (s *Stream) SubscribeAll(typeURL string, held map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := Name{typeURL, wildcard}
	if s.held[n] != nil {
		return
	}
	s.held[n] = &holding{known: len(held) > 0}
	for _, l := range s.links {
		known := held
		if l.index != max(s.active, 0) {
			known = unversioned(maps.Keys(held)) // another server's versions say nothing to this one
		}
		s.do(l, l.machine.Step(SubscribeAll{Type: typeURL, Held: known}))
		signal(l.wake)
	}
	s.fallBack()
}

// Hold adds to what the caller has, when it learns of it after SubscribeAll. A server that has been
// asked already is not told, and counts as knowing of it only once it sends it.
func (s *Stream) Hold(typeURL string, held map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.held[Name{typeURL, wildcard}]
	if h == nil {
		return
	}
	h.known = h.known || len(held) > 0
	for _, l := range s.links {
		known := held
		if l.index != max(s.active, 0) {
			known = unversioned(maps.Keys(held))
		}
		s.do(l, l.machine.Step(SubscribeAll{Type: typeURL, Held: known}))
	}
}

// UnsubscribeAll ends that.
func (s *Stream) UnsubscribeAll(typeURL string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := Name{typeURL, wildcard}
	if s.held[n] == nil {
		return
	}
	delete(s.held, n)
	for _, l := range s.links {
		s.do(l, l.machine.Step(UnsubscribeAll{typeURL}))
		signal(l.wake)
	}
}

// inherit tells the machine of the server whose news count from now on what the one before had
// sent: it must be told when it is gone. The lock is held.
func (s *Stream) inherit(from, to *link) {
	for url, names := range from.machine.covered() {
		to.machine.Step(SubscribeAll{Type: url, Held: unversioned(slices.Values(names))})
	}
}

func unversioned(names iter.Seq[string]) map[string]string {
	out := map[string]string{}
	for name := range names {
		out[name] = ""
	}
	return out
}
