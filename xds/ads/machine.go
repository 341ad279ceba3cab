// Package ads speaks the aggregated discovery service of xDS v3: incremental ("delta") by choice,
// state of the world ("SotW") where a server has no other. machine.go decides: events in, actions
// out, no clock and no network. stream.go does: connections, retries, timers and the server list.
// xds.Client is the one caller. Nothing here knows what a resource means; Config.Check says that.
package ads

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Name is a resource by type URL and name.
type Name struct{ Type, Name string }

// Mode is the variant of the protocol on a stream.
type Mode int

// Variants.
const (
	Delta Mode = iota
	SotW
)

func (m Mode) String() string {
	if m == SotW {
		return "sotw"
	}
	return "delta"
}

// Event is something that happened; one of the types below.
type Event interface{ event() }

type (
	// Subscribe asks for a resource. Known says that the caller holds a value, Version which one
	// of this server's it is; empty when it is not this server's.
	Subscribe struct {
		Name
		Version string
		Known   bool
	}
	// Unsubscribe ends that.
	Unsubscribe struct{ Name }
	// SubscribeAll asks for every resource of a type, those included that come to exist later. Held
	// are the values that the caller has, by name, with this server's version of each; empty when
	// it is not this server's. Asked again it only adds to what is held.
	SubscribeAll struct {
		Type string
		Held map[string]string
	}
	// UnsubscribeAll ends that. Names that were subscribed to stay so.
	UnsubscribeAll struct{ Type string }
	// Forget says that what the caller holds no longer is what this server sent.
	Forget struct{}
	// Connected says that a stream is up; nothing has been sent on it.
	Connected struct{ Mode Mode }
	// Disconnected says that it is gone.
	Disconnected struct{}
	// Flush asks for the requests that changes of subscription need. Several changes before one
	// Flush share a request.
	Flush struct{}
	// Response is a message of the server with the verdict on each resource.
	Response struct {
		Type, Nonce string
		Version     string // SotW: version_info
		Resources   []Received
		Removed     []string // delta
	}
	// TimedOut says that the timer of a resource ran out.
	TimedOut struct{ Name }
	// Due says that a Hold has lasted long enough.
	Due struct{ Type string }
)

func (Subscribe) event()      {}
func (Unsubscribe) event()    {}
func (SubscribeAll) event()   {}
func (UnsubscribeAll) event() {}
func (Forget) event()         {}
func (Connected) event()      {}
func (Disconnected) event()   {}
func (Flush) event()          {}
func (Response) event()       {}
func (TimedOut) event()       {}
func (Due) event()            {}

// Received is one resource of a response.
type Received struct {
	Name    string // empty when Err is not nil and the bytes do not tell
	Version string
	Bytes   []byte
	Value   any   // whatever Config.Check made of the bytes
	Err     error // why it is rejected
}

// Action is something to be done; one of the types below.
type Action interface{ action() }

type (
	// Send is a request for the server.
	Send struct{ Request }
	// Deliver is news for the caller.
	Deliver struct{ Update }
	// StartTimer asks for TimedOut in due time; StopTimer takes that back.
	StartTimer struct{ Name }
	StopTimer  struct{ Name }
	// Hold asks for Due after a wait, the longer the higher Again is (from 1): the server has sent
	// what was rejected that many times more. EndHold takes it back.
	Hold struct {
		Type  string
		Again int
	}
	EndHold struct{ Type string }
)

func (Send) action()       {}
func (Deliver) action()    {}
func (StartTimer) action() {}
func (StopTimer) action()  {}
func (Hold) action()       {}
func (EndHold) action()    {}

// Request is a discovery request of either variant.
type Request struct {
	Mode Mode
	Type string
	// First says that it is the first of the stream and carries the node.
	First bool
	// Delta.
	Subscribe, Unsubscribe []string
	InitialVersions        map[string]string
	// SotW.
	Names   []string
	Version string

	Nonce string // of the response that is answered; empty for none
	Error string // not empty: NACK
}

// Update is what became of a resource: a new value, a rejected one, or none.
type Update struct {
	Name
	Received // Err set: rejected, the value before still holds
	// NotExist says that the server has no such resource.
	NotExist bool
	// Synced, of the name "*": everything of the type that the server had when it was asked has been
	// delivered. With Err it cannot be had from this server.
	Synced bool
}

// Machine is the state of one server's stream and of the subscriptions on it. It is not safe for
// concurrent use.
type Machine struct {
	types     map[string]*typeState
	order     []string // type URLs in the order of their first subscription
	connected bool
	mode      Mode
	spoken    bool // the node has been sent on this stream
}

type typeState struct {
	url     string
	entries map[string]*entry
	wire    map[string]bool // what the server has been asked for on this stream
	opened  bool            // a request of this type has been sent on this stream
	dirty   bool            // entries and wire differ
	nonce   string          // of the last response on this stream
	version string          // SotW: of the last accepted response of this server
	all     everything

	// SotW: the response of this stream that was rejected last.
	nacked   bool
	rejected string // its version
	again    int    // how many times the server sent it again
	held     string // the text of a NACK that waits; empty for none
}

type entry struct {
	version   string // of this server, of the value the caller holds; empty for none
	known     bool   // the caller holds a value
	confirmed bool   // this server has sent that value in this process
	absent    bool   // this server said, or by its silence, that there is none
	sent      bool   // asked for on this stream
	timer     bool
	// covered says that it is here because everything of the type is wanted, not by its name.
	covered bool
	// told says that the server was told on this stream that the caller holds it, or has spoken of it.
	told bool
}

// NewMachine returns a machine without subscriptions, disconnected.
func NewMachine() *Machine { return &Machine{types: map[string]*typeState{}} }

// Step takes one event and returns what is to be done, in order.
func (m *Machine) Step(e Event) []Action {
	switch e := e.(type) {
	case Subscribe:
		return m.subscribe(e)
	case Unsubscribe:
		return m.unsubscribe(e.Name)
	case SubscribeAll:
		m.subscribeAll(e)
	case UnsubscribeAll:
		return m.unsubscribeAll(e.Type)
	case Forget:
		for _, t := range m.types {
			t.version = ""
			for _, en := range t.entries {
				en.version, en.confirmed = "", false
			}
		}
	case Connected:
		m.connected, m.mode, m.spoken = true, e.Mode, false
		for _, t := range m.types {
			t.dirty = true
		}
	case Disconnected:
		return m.disconnect()
	case Flush:
		return m.flush()
	case Response:
		return m.response(e)
	case TimedOut:
		return m.timedOut(e.Name)
	case Due:
		return m.due(e.Type)
	}
	return nil
}

func (m *Machine) subscribe(e Subscribe) []Action {
	t := m.state(e.Type)
	switch en := t.entries[e.Name.Name]; {
	case en == nil:
		t.entries[e.Name.Name] = &entry{version: e.Version, known: e.Known}
		t.dirty = true
	case en.covered:
		en.covered = false
		t.dirty = true
	}
	return nil
}

func (m *Machine) state(url string) *typeState {
	t := m.types[url]
	if t == nil {
		t = &typeState{url: url, entries: map[string]*entry{}, wire: map[string]bool{}}
		m.types[url] = t
		m.order = append(m.order, url)
	}
	return t
}

func (m *Machine) unsubscribe(n Name) []Action {
	t := m.types[n.Type]
	if t == nil || t.entries[n.Name] == nil || t.entries[n.Name].covered {
		return nil
	}
	out := t.stop(nil, n.Name)
	if e := t.entries[n.Name]; t.all.wanted && e.known {
		e.covered, e.sent = true, false
	} else {
		delete(t.entries, n.Name)
	}
	t.dirty = true
	return out
}

func (t *typeState) stop(out []Action, name string) []Action {
	if e := t.entries[name]; e != nil && e.timer {
		e.timer = false
		out = append(out, StopTimer{Name{t.url, name}})
	}
	return out
}

func (m *Machine) disconnect() []Action {
	var out []Action
	m.connected = false
	for _, url := range m.order {
		t := m.types[url]
		for _, name := range slices.Sorted(maps.Keys(t.entries)) {
			// gRFC A57: the timer runs only while the stream is connected.
			out = t.stop(out, name)
			t.entries[name].sent, t.entries[name].told = false, false
		}
		t.endAll()
		t.opened, t.nonce = false, ""
		if t.held != "" {
			out = append(out, EndHold{url})
		}
		t.nacked, t.rejected, t.again, t.held = false, "", 0, ""
		clear(t.wire)
	}
	return out
}

func (m *Machine) flush() []Action {
	if !m.connected {
		return nil
	}
	var out []Action
	for _, url := range m.order {
		t := m.types[url]
		// xDS protocol: a client that "has never explicitly subscribed to any resource names" is
		// treated as if it had subscribed to "*". So a type without names is not opened.
		switch {
		case !t.dirty:
		case m.mode == Delta:
			if t.opened || t.all.wanted || t.named() {
				out = m.flushDelta(out, t)
			}
		default:
			out = t.refuseAll(out)
			if t.opened || t.named() {
				out = m.sendNames(out, t, t.resumeVersion(), t.held)
			}
		}
	}
	return out
}

func (m *Machine) flushDelta(out []Action, t *typeState) []Action {
	r := Request{Mode: Delta, Type: t.url}
	for name := range t.wire {
		if e := t.entries[name]; name != wildcard && (e == nil || e.covered) || name == wildcard && !t.all.wanted {
			r.Unsubscribe = append(r.Unsubscribe, name)
		}
	}
	if t.all.wanted && !t.all.asked {
		r.Subscribe = append(r.Subscribe, wildcard)
		r.InitialVersions = t.claims()
		t.all.asked = true
		t.wire[wildcard] = true
	}
	var asked []string
	for name, e := range t.entries {
		if e.sent || e.covered {
			continue
		}
		// A name that was dropped and asked for again before the server heard of it is asked for
		// again too. xDS protocol: "the server must resend any newly requested resources, even if it
		// previously sent those resources".
		r.Subscribe = append(r.Subscribe, name)
		asked = append(asked, name)
		// DeltaDiscoveryRequest.initial_resource_versions "will not be populated [...] In any message
		// after the first in a stream (for a given type_url)".
		if !t.opened && e.version != "" {
			if r.InitialVersions == nil {
				r.InitialVersions = map[string]string{}
			}
			r.InitialVersions[name] = e.version
			e.told = true
		}
	}
	t.dirty = false
	if len(r.Subscribe) == 0 && len(r.Unsubscribe) == 0 {
		return out
	}
	slices.Sort(r.Subscribe)
	slices.Sort(r.Unsubscribe)
	slices.Sort(asked)
	for _, name := range r.Unsubscribe {
		delete(t.wire, name)
	}
	out = append(out, m.request(r))
	t.opened = true
	return t.asked(out, asked, func(e *entry) bool { return !e.known })
}

// sendNames sends a SotW request: it always carries all names.
func (m *Machine) sendNames(out []Action, t *typeState, version, fault string) []Action {
	if t.held != "" {
		t.held = ""
		out = append(out, EndHold{t.url})
	}
	var names []string
	for name, e := range t.entries {
		if !e.covered {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	var asked []string
	for _, name := range names {
		if !t.entries[name].sent {
			asked = append(asked, name)
		}
	}
	t.dirty, t.opened = false, true
	clear(t.wire)
	out = append(out, m.request(Request{Mode: SotW, Type: t.url, Names: names, Version: version, Nonce: t.nonce, Error: fault}))
	// SotW cannot say "unchanged" nor, but for listeners and clusters, "gone": what this server
	// never sent is waited for, whatever a cache holds.
	return t.asked(out, asked, func(e *entry) bool { return !e.confirmed })
}

// resumeVersion is the version of a SotW request outside an answer. On a new stream it says "I
// have that", which is true only if all names came from this server.
func (t *typeState) resumeVersion() string {
	if !t.opened {
		for _, e := range t.entries {
			if !e.confirmed && !e.covered {
				return ""
			}
		}
	}
	return t.version
}

func (t *typeState) asked(out []Action, names []string, timed func(*entry) bool) []Action {
	for _, name := range names {
		e := t.entries[name]
		e.sent = true
		t.wire[name] = true
		if timed(e) && !e.absent && !e.timer {
			e.timer = true
			out = append(out, StartTimer{Name{t.url, name}})
		}
	}
	return out
}

func (m *Machine) request(r Request) Action {
	// xDS protocol: "only the first request on a stream is guaranteed to carry the node identifier".
	r.First = !m.spoken
	m.spoken = true
	return Send{r}
}

func (m *Machine) response(r Response) []Action {
	t := m.types[r.Type]
	// A type that was never asked for on this stream is not answered: the answer would be its
	// first request and, without names, ask for everything.
	if !m.connected || t == nil || !t.opened {
		return nil
	}
	t.nonce = r.Nonce
	var out []Action
	var errs []error
	nameless, probed := false, false
	present := map[string]bool{}
	twice := duplicates(r.Resources)
	for _, res := range r.Resources {
		if twice[res.Name] && present[res.Name] {
			continue // said at its first place
		}
		present[res.Name] = true
		if res.Err == nil && twice[res.Name] {
			res.Err = fmt.Errorf("resource %q stands twice in one response: want it once", res.Name)
		}
		if res.Err != nil {
			errs = append(errs, res.Err)
			nameless = nameless || res.Name == ""
		}
		if t.all.probing && res.Name == probe {
			probed = true
			continue
		}
		e := t.entries[res.Name]
		if e == nil && t.all.asked && res.Name != "" {
			e = &entry{covered: true}
			t.entries[res.Name] = e
		}
		if e == nil {
			continue // dropped in the meantime, or never asked for
		}
		e.told = true
		out = t.stop(out, res.Name)
		if res.Err == nil {
			// gRFC A46: the good resources of a response are used even when others are bad.
			e.version, e.known, e.confirmed, e.absent = res.Version, true, true, false
		}
		out = append(out, Deliver{Update{Name: Name{t.url, res.Name}, Received: res}})
	}
	removed := r.Removed
	if m.mode == SotW {
		removed = t.missing(present, nameless)
	}
	for _, name := range removed {
		if t.all.probing && name == probe {
			probed = true
			continue
		}
		if e := t.entries[name]; e != nil {
			out = t.stop(out, name)
			out = t.gone(out, name, e)
		}
	}
	fault := faultText(errs)
	if m.mode == Delta {
		if probed {
			out = t.sync(out)
		}
		out = append(out, m.request(Request{Mode: Delta, Type: t.url, Nonce: r.Nonce, Error: fault}))
		if t.all.asked && !t.all.probing && !t.all.synced {
			t.probe()
		}
		if t.dirty && (probed || t.all.probing) {
			out = m.flushDelta(out, t)
		}
		return out
	}
	// xDS protocol, of a NACK: its version_info "indicates the most recent version that the client
	// is using".
	switch {
	case fault == "":
		t.version, t.nacked, t.again = r.Version, false, 0
	case !t.nacked || t.rejected != r.Version:
		t.nacked, t.rejected, t.again = true, r.Version, 0
	default:
		// A server that compares version_info alone answers every NACK with what was rejected, as
		// fast as it is told: go-control-plane's snapshot cache does. The protocol sets no time for
		// an answer, so this one waits.
		t.again++
		if t.held != "" {
			out = append(out, EndHold{t.url})
		}
		t.held = fault
		return append(out, Hold{t.url, t.again})
	}
	return m.sendNames(out, t, t.version, fault)
}

// due sends a NACK that has waited.
func (m *Machine) due(typeURL string) []Action {
	t := m.types[typeURL]
	if !m.connected || t == nil || t.held == "" {
		return nil // sent with other news, or the stream is gone
	}
	return m.sendNames(nil, t, t.version, t.held)
}

// duplicates are the names that stand more than once. xDS protocol: "Clients should NACK responses
// that contain multiple instances of the same resource name."
func duplicates(resources []Received) map[string]bool {
	var twice map[string]bool
	seen := make(map[string]bool, len(resources))
	for _, res := range resources {
		if seen[res.Name] && res.Name != "" {
			if twice == nil {
				twice = map[string]bool{}
			}
			twice[res.Name] = true
		}
		seen[res.Name] = true
	}
	return twice
}

// fullState are the types whose SotW responses hold everything that was asked for.
//
// xDS protocol: "For Listener and Cluster resource types, if a previously seen resource is not
// present in a new response, that indicates that the resource has been removed".
var fullState = map[string]bool{
	"type.googleapis.com/envoy.config.listener.v3.Listener": true,
	"type.googleapis.com/envoy.config.cluster.v3.Cluster":   true,
}

// missing lists what this server had sent and now leaves out. A resource that could not be read
// far enough to tell its name may be any of them: nothing is then deleted.
func (t *typeState) missing(present map[string]bool, nameless bool) []string {
	if !fullState[t.url] || nameless {
		return nil
	}
	var out []string
	for name, e := range t.entries {
		if e.confirmed && !e.covered && !present[name] {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func (t *typeState) gone(out []Action, name string, e *entry) []Action {
	if e.absent {
		return out
	}
	if e.covered {
		delete(t.entries, name)
	}
	e.version, e.known, e.confirmed, e.absent = "", false, false, true
	return append(out, Deliver{Update{Name: Name{t.url, name}, Received: Received{Name: name}, NotExist: true}})
}

func (m *Machine) timedOut(n Name) []Action {
	t := m.types[n.Type]
	if t == nil || t.entries[n.Name] == nil || !t.entries[n.Name].timer {
		return nil // answered or dropped while the timer fired
	}
	// xDS protocol: clients "use a timeout (recommended duration is 15 seconds) after sending a
	// request for a new resource, after which they will consider the requested resource to not exist".
	t.entries[n.Name].timer = false
	if n.Name == probe && t.all.probing {
		return m.flushDelta(t.sync(nil), t)
	}
	return t.gone(nil, n.Name, t.entries[n.Name])
}

// maxFault bounds the text of a NACK, in bytes.
const maxFault = 4096

func faultText(errs []error) string {
	if len(errs) == 0 {
		return ""
	}
	s := strings.ToValidUTF8(errors.Join(errs...).Error(), "?")
	if len(s) > maxFault {
		s = strings.ToValidUTF8(s[:maxFault], "") + fmt.Sprintf(" ... (%d faults)", len(errs))
	}
	return s
}
