package serve

import (
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

const wildcard = "*"

// session is what one stream has asked for, been sent and accepted. It decides and does nothing:
// requests go in, responses come out of plan. It is guarded by its stream.
type session struct {
	view  xdsgen.View
	delta bool
	types map[string]*typeState
	names int    // subscriptions of all types
	nonce uint64 // of the last response; 0 before the first
	max   int    // bound of names
	size  int    // Config.MaxResponse
}

func newSession(v xdsgen.View, delta bool, cfg Config) *session {
	s := &session{view: v, delta: delta, types: map[string]*typeState{}, max: cfg.MaxNames, size: cfg.MaxResponse}
	if v.Kind == xdsgen.Node {
		s.max *= nodeNames
	}
	return s
}

// typeState is the part of one type URL.
type typeState struct {
	url      string
	wildcard bool
	subs     map[string]*sub
	// dirty are the names to look at again; true forces the resource to be sent even if the client
	// should have it.
	dirty map[string]bool
	// expand asks for every name of the view to be looked at: a wildcard is new.
	expand bool
	// answer asks for a response even if it is empty.
	answer bool
	// named is true once a state-of-the-world request named something: after that, an empty list
	// means nothing, no longer everything.
	named    bool
	last     uint64 // nonce of the last response of this type
	inflight []flight
	flown    int // names in inflight
}

// flight is one response that has not been acknowledged.
type flight struct {
	nonce uint64
	names []string
}

// sub is one name of one type.
type sub struct {
	explicit bool // asked for by name; false when only the wildcard covers it
	// sent is what the client was given last; nil for nothing, or for the word that there is none.
	sent *xdsgen.Resource
	// absent is true when the client knows that the resource does not exist.
	absent bool
	// acked is what the client accepted last.
	acked *xdsgen.Resource
	// claimed is the version that the client brought from another stream and we have not confirmed.
	claimed string
	// sentNonce is the response that sent was in; ackedNonce the last one that was accepted.
	sentNonce, ackedNonce uint64
	pending               bool // sentNonce is neither accepted nor rejected
	// rejected is the version that the client refused; it is not sent again.
	rejected, nack string
	withheld       string
	changed        time.Time
}

// state returns the part of a type, made when new.
func (s *session) state(url string) (_ *typeState, first bool, err error) {
	if t := s.types[url]; t != nil {
		return t, false, nil
	}
	if url == "" {
		return nil, false, status.Error(codes.InvalidArgument, "request without type_url: ADS needs one in every request")
	}
	if len(s.types) == maxTypes || len(url) > maxNameLength {
		return nil, false, status.Errorf(codes.ResourceExhausted, "type URL %q: want at most %d types a stream", clip(url), maxTypes)
	}
	t := &typeState{url: url, subs: map[string]*sub{}, dirty: map[string]bool{}}
	s.types[url] = t
	return t, true, nil
}

// check refuses names that no resource can have and subscriptions beyond the bound.
func (s *session) check(t *typeState, names []string) error {
	fresh := 0
	for _, n := range names {
		if n == "" || len(n) > maxNameLength {
			return status.Errorf(codes.InvalidArgument, "resource name %q: want 1 to %d bytes", clip(n), maxNameLength)
		}
		if t.subs[n] == nil {
			fresh++
		}
	}
	if s.names+fresh > s.max {
		return status.Errorf(codes.ResourceExhausted,
			"%d subscriptions on one stream: want at most %d; unsubscribe from what is not used", s.names+fresh, s.max)
	}
	return nil
}

// add subscribes to a name and says whether it is new to the index.
func (s *session) add(t *typeState, name string, force bool) (added bool) {
	u := t.subs[name]
	if u == nil {
		u = &sub{}
		t.subs[name] = u
		s.names++
	}
	added = !u.explicit
	u.explicit = true
	t.dirty[name] = t.dirty[name] || force
	return added
}

// drop unsubscribes from a name and says whether the index must forget it.
func (s *session) drop(t *typeState, name string) bool {
	u := t.subs[name]
	if u == nil || !u.explicit {
		return false
	}
	if t.wildcard {
		// Delta protocol: a name that the wildcard still covers after it was unsubscribed is sent
		// again, or said to be gone.
		u.explicit = false
		t.dirty[name] = true
		return true
	}
	s.forget(t, name)
	return true
}

func (s *session) forget(t *typeState, name string) {
	if t.subs[name] != nil {
		delete(t.subs, name)
		s.names--
	}
	delete(t.dirty, name)
}

// wild turns the wildcard of a type on or off.
func (s *session) wild(t *typeState, on bool) (changed bool) {
	if t.wildcard == on {
		return false
	}
	t.wildcard = on
	if on {
		t.expand, t.answer = true, true
		if s.delta {
			s.reclaim(t)
		}
		return true
	}
	for name, u := range t.subs {
		if !u.explicit {
			s.forget(t, name)
		}
	}
	return true
}

// reclaim takes back the names of responses under way that the client unsubscribed from since: it
// will read them below the wildcard, and must be told if they are gone.
func (s *session) reclaim(t *typeState) {
	for _, f := range t.inflight {
		for _, name := range f.names {
			if t.subs[name] == nil {
				t.subs[name] = &sub{claimed: "under way"}
				s.names++
				t.dirty[name] = false
			}
		}
	}
}

// keys are what the index calls a name of this session; the wildcard of listeners stands in each
// scope that the view sees.
func (s *session) keys(t *typeState, name string) []xdsgen.Key {
	if name != wildcard {
		return []xdsgen.Key{xdsgen.KeyOf(s.view, t.url, name)}
	}
	scopes := []string{""}
	if t.url == xdsgen.ListenerType {
		scopes = xdsgen.Scopes(s.view)
	}
	var out []xdsgen.Key
	for _, scope := range scopes {
		out = append(out, xdsgen.Key{Kind: s.view.Kind, Scope: scope, Type: t.url, Name: wildcard})
	}
	return out
}

// touch marks a name that was published anew.
func (s *session) touch(url, name string) {
	t := s.types[url]
	if t == nil || t.subs[name] == nil && !t.wildcard {
		return
	}
	t.dirty[name] = t.dirty[name] || false
}

// touchAll marks everything.
func (s *session) touchAll() {
	for _, t := range s.types {
		for name := range t.subs {
			t.dirty[name] = t.dirty[name] || false
		}
		t.expand = t.expand || t.wildcard
	}
}

// due says whether anything waits to be looked at.
func (s *session) due() bool {
	for _, t := range s.types {
		if len(t.dirty) > 0 || t.expand || t.answer {
			return true
		}
	}
	return false
}

// settle takes the client's word on a response: accepted when nack is empty. It says whether
// anything about a subscription changed, and which names were rejected.
func (t *typeState) settle(nonce uint64, nack string, now time.Time) (changed bool, rejected []string) {
	at := slices.IndexFunc(t.inflight, func(f flight) bool { return f.nonce == nonce })
	if at < 0 {
		return false, nil // of a response that is long superseded, or never was
	}
	for i, f := range t.inflight[:at+1] {
		// A client handles responses in order: having judged this one, it took those before it.
		var bad map[string]bool
		if i == at && nack != "" {
			bad = blamed(nack, f.names)
		}
		for _, name := range f.names {
			u := t.subs[name]
			if u == nil || u.sentNonce != f.nonce || !u.pending {
				continue
			}
			changed = true
			u.pending, u.changed = false, now
			if bad[name] {
				u.rejected, u.nack = versionOf(u.sent), clip(nack)
				rejected = append(rejected, name)
				continue
			}
			u.acked, u.ackedNonce, u.claimed = u.sent, f.nonce, ""
		}
		t.flown -= len(f.names)
	}
	t.inflight = slices.Delete(t.inflight, 0, at+1)
	return changed, rejected
}

// blamed are the names of a response that a client's text complains of. gRFC A46 has the good
// resources of such a response used, and its texts name the bad ones; a text that names none
// blames all.
func blamed(text string, names []string) map[string]bool {
	bad := map[string]bool{}
	for _, n := range names {
		if mentions(text, n) {
			bad[n] = true
		}
	}
	if len(bad) == 0 {
		for _, n := range names {
			bad[n] = true
		}
	}
	return bad
}

// mentions says whether a text holds a name that is not part of a longer one.
func mentions(text, name string) bool {
	for from := 0; ; {
		i := strings.Index(text[from:], name)
		if i < 0 {
			return false
		}
		i += from
		end := i + len(name)
		if (i == 0 || !nameByte(text[i-1])) && (end == len(text) || !nameByte(text[end]) || !nameGoesOn(text[end:])) {
			return true
		}
		from = i + 1
	}
}

// nameGoesOn tells "orders:8080" from "orders: bad" and "orders." at the end of a sentence.
func nameGoesOn(rest string) bool {
	if rest[0] != ':' && rest[0] != '.' {
		return true
	}
	return len(rest) > 1 && nameByte(rest[1])
}

func nameByte(b byte) bool {
	return b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || strings.IndexByte("-_.:|/", b) >= 0
}

// flew records a response. A client that never answers cannot make the record grow beyond its
// subscriptions: what a later response replaced is dropped.
func (t *typeState) flew(nonce uint64, names []string) {
	t.last = nonce
	t.inflight = append(t.inflight, flight{nonce, names})
	t.flown += len(names)
	if t.flown <= 4*len(t.subs)+64 && len(t.inflight) <= 4*len(t.subs)+64 {
		return
	}
	t.flown = 0
	t.inflight = slices.DeleteFunc(t.inflight, func(f flight) bool {
		if f.nonce == nonce {
			t.flown += len(f.names)
			return false
		}
		live := slices.ContainsFunc(f.names, func(n string) bool { u := t.subs[n]; return u != nil && u.sentNonce == f.nonce })
		if live {
			t.flown += len(f.names)
		}
		return !live
	})
}

func versionOf(r *xdsgen.Resource) string {
	if r == nil {
		return ""
	}
	return r.Version
}

// state words, as in admin's answers.
const (
	stateAcked   = "acked"
	statePending = "pending"
	stateNacked  = "nacked"
)

// summary says how far the client is.
func (s *session) summary() string {
	state := stateAcked
	for _, t := range s.types {
		if len(t.dirty) > 0 || t.expand {
			state = statePending
		}
		for _, u := range t.subs {
			if u.rejected != "" {
				return stateNacked
			}
			if u.pending {
				state = statePending
			}
		}
	}
	return state
}
