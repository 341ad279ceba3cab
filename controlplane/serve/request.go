package serve

import (
	"cmp"
	"slices"
	"strconv"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// effect is what a request did beside changing the session.
type effect struct {
	added, removed []xdsgen.Key // for the index
	settled        bool         // something was accepted or rejected
	rejected       []string
	nack           string
}

// whole says whether a type is sent as a whole in state-of-the-world, so that absence removes.
// xDS protocol: "for Listener and Cluster resource types ... the server must return all resources
// that the client has subscribed to in each request".
func whole(url string) bool { return url == xdsgen.ListenerType || url == xdsgen.ClusterType }

// applyDelta takes one delta request.
func (s *session) applyDelta(req *discoveryv3.DeltaDiscoveryRequest, now time.Time) (effect, error) {
	var e effect
	t, first, err := s.state(req.GetTypeUrl())
	if err != nil {
		return e, err
	}
	s.settle(t, req.GetResponseNonce(), req.GetErrorDetail().GetMessage(), req.GetErrorDetail() != nil, now, &e)

	subscribe, star := without(req.GetResourceNamesSubscribe())
	// xDS protocol: a first request without names is a wildcard, "for historical reasons", for
	// Listener and Cluster.
	star = star || first && whole(t.url) && len(subscribe) == 0 && len(req.GetResourceNamesUnsubscribe()) == 0
	if err := s.check(t, subscribe); err != nil {
		return e, err
	}
	if star {
		if s.wild(t, true) {
			e.added = append(e.added, s.keys(t, wildcard)...)
		} else {
			t.expand = true
		}
	}
	for _, name := range subscribe {
		// A client that subscribes to what it had already has lost it, or wants what it rejected.
		if s.add(t, name, t.subs[name] != nil) {
			e.added = append(e.added, s.keys(t, name)...)
		}
	}
	if first {
		if err := s.claim(t, req.GetInitialResourceVersions()); err != nil {
			return e, err
		}
	}
	unsubscribe, star := without(req.GetResourceNamesUnsubscribe())
	for _, name := range unsubscribe {
		if s.drop(t, name) {
			e.removed = append(e.removed, s.keys(t, name)...)
		}
	}
	if star && s.wild(t, false) {
		e.removed = append(e.removed, s.keys(t, wildcard)...)
	}
	return e, nil
}

// claim notes what a client brought from an earlier stream.
func (s *session) claim(t *typeState, versions map[string]string) error {
	if t.wildcard {
		names := make([]string, 0, len(versions))
		for name := range versions {
			names = append(names, name)
		}
		if err := s.check(t, names); err != nil {
			return err
		}
	}
	for name, version := range versions {
		u := t.subs[name]
		if u == nil && t.wildcard {
			u = &sub{}
			t.subs[name] = u
			s.names++
			t.dirty[name] = false
		}
		if u != nil {
			u.claimed = version
		}
	}
	return nil
}

// applySotW takes one state-of-the-world request.
func (s *session) applySotW(req *discoveryv3.DiscoveryRequest, now time.Time) (effect, error) {
	var e effect
	t, first, err := s.state(req.GetTypeUrl())
	if err != nil {
		return e, err
	}
	s.settle(t, req.GetResponseNonce(), req.GetErrorDetail().GetMessage(), req.GetErrorDetail() != nil, now, &e)
	if n := req.GetResponseNonce(); n != "" && t.last != 0 && n != strconv.FormatUint(t.last, 10) {
		// xDS protocol: "the management server should not send a DiscoveryResponse for any
		// DiscoveryRequest that has a stale nonce"; the client sends its names again with the newest.
		return e, nil
	}
	names, star := without(req.GetResourceNames())
	if len(names) == 0 && !star {
		star = whole(t.url) && !t.named
	}
	t.named = t.named || len(names) > 0
	if err := s.check(t, names); err != nil {
		return e, err
	}
	if star && s.wild(t, true) {
		e.added = append(e.added, s.keys(t, wildcard)...)
	}
	for name, u := range t.subs {
		if _, keep := slices.BinarySearch(names, name); u.explicit && !keep && s.drop(t, name) {
			e.removed = append(e.removed, s.keys(t, name)...)
		}
	}
	for _, name := range names {
		if u := t.subs[name]; u != nil && u.explicit {
			continue
		}
		s.add(t, name, false)
		e.added = append(e.added, s.keys(t, name)...)
		if first && req.GetVersionInfo() != "" {
			t.subs[name].claimed = "of another stream: " + clip(req.GetVersionInfo())
		}
	}
	// After the names: what the wildcard had and is now named stays as it is.
	if !star && s.wild(t, false) {
		e.removed = append(e.removed, s.keys(t, wildcard)...)
	}
	t.answer = t.answer || first && whole(t.url)
	return e, nil
}

// settle handles the answer to a response, if the request is one.
func (s *session) settle(t *typeState, nonce, text string, failed bool, now time.Time, e *effect) {
	n, err := strconv.ParseUint(nonce, 10, 64)
	if err != nil || n == 0 {
		return // not one of ours
	}
	if failed {
		e.nack = clip(cmp.Or(text, "rejected without a reason"))
	}
	e.settled, e.rejected = t.settle(n, e.nack, now)
}

// without sorts names, drops duplicates and takes the wildcard out.
func without(names []string) (_ []string, star bool) {
	out := slices.Clone(names)
	slices.Sort(out)
	out = slices.Compact(out)
	if i, ok := slices.BinarySearch(out, wildcard); ok {
		return slices.Delete(out, i, i+1), true
	}
	return out, false
}
