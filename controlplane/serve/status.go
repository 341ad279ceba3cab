package serve

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// ClientStatus is one connected client.
type ClientStatus struct {
	NodeID   string
	Identity string // SPIFFE ID; empty for a client without one
	Kind     xdsgen.Kind
	// Namespace and Service are its identity class; Service is empty without an identity.
	Namespace, Service string
	Protocol           string // "delta" or "sotw"
	Agent              string // user agent name and version
	SDKVersion         string // empty for other clients
	Address            string
	Connected          time.Time
	State              string // "acked", "pending" or "nacked"
	Subscribed         int    // resources asked for
	// Resources by type and name; only from Clients(true).
	Resources []ResourceStatus
}

// ResourceStatus is one subscription of a client.
type ResourceStatus struct {
	TypeURL, Name string
	Sent, Acked   string // versions; empty for none
	Nack          string // the text of the rejection of Sent, or empty
	Changed       time.Time
	Withheld      string // why the resource is not served to this client
}

// Clients returns the connected clients, oldest first; their resources too if asked.
func (s *Server) Clients(resources bool) []ClientStatus {
	var out []ClientStatus
	for _, st := range s.all() {
		out = append(out, st.status(resources))
	}
	return out
}

func (st *stream) status(resources bool) ClientStatus {
	st.mu.Lock()
	defer st.mu.Unlock()
	c := ClientStatus{
		NodeID: st.client.nodeID, Identity: st.client.identity,
		Kind: st.client.view.Kind, Namespace: st.client.view.Namespace, Service: st.client.view.Service,
		Protocol: "sotw", Agent: st.client.agent, Address: st.client.address, Connected: st.connected,
		State: st.sum(), Subscribed: st.session.names,
	}
	if st.session.delta {
		c.Protocol = "delta"
	}
	if c.Kind == xdsgen.SDK {
		c.SDKVersion = st.client.agentVersion
	}
	if !resources {
		return c
	}
	for url, t := range st.session.types {
		if why := xdsgen.WithheldType(st.client.view, url); why != "" && t.wildcard {
			c.Resources = append(c.Resources, ResourceStatus{TypeURL: url, Name: wildcard, Withheld: why})
		}
		for name, u := range t.subs {
			c.Resources = append(c.Resources, ResourceStatus{
				TypeURL: url, Name: name, Sent: versionOf(u.sent), Acked: versionOf(u.acked),
				Nack: u.nack, Changed: u.changed, Withheld: u.withheld,
			})
		}
	}
	slices.SortFunc(c.Resources, func(a, b ResourceStatus) int {
		return cmp.Or(cmp.Compare(a.TypeURL, b.TypeURL), cmp.Compare(a.Name, b.Name))
	})
	return c
}

// sum is the session's summary, kept until something changes. st.mu is held.
func (st *stream) sum() string {
	if !st.summed {
		st.summary, st.summed = st.session.summary(), true
	}
	return st.summary
}

// Acks says how many clients hold everything of a revision that they asked for, how many asked for
// anything, and how many rejected part of it. Only the published revision is known: any other
// gives zeros.
func (s *Server) Acks(revision string) (acked, subscribed, nacked int) {
	views := s.views.Load()
	if views == nil || views.Mesh().Revision != revision {
		return 0, 0, 0
	}
	for _, st := range s.all() {
		st.mu.Lock()
		n, state := st.session.names, st.sum()
		st.mu.Unlock()
		if n == 0 {
			continue
		}
		subscribed++
		switch state {
		case stateAcked:
			acked++
		case stateNacked:
			nacked++
		}
	}
	return acked, subscribed, nacked
}

// WaitDrained blocks until the published mesh has the instance healthy nowhere and every stream
// that may hold endpoints with it has acknowledged a version without it, or is gone. It returns
// false when ctx ended first. A client that rejects the newer version keeps it waiting.
func (s *Server) WaitDrained(ctx context.Context, instanceID string) bool {
	for {
		changed := s.Changed() // before the look, or the change in between is missed
		if views := s.views.Load(); views != nil && !views.Healthy(instanceID) {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
	holders := s.holders(instanceID)
	for {
		changed := s.Changed()
		holders = slices.DeleteFunc(holders, func(h holder) bool { return h.free(instanceID) })
		if len(holders) == 0 {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// holder is a subscription whose client may still have an instance among its endpoints.
type holder struct {
	st        *stream
	url, name string
	// since is the first response after which the client cannot have it.
	since uint64
}

// holders finds the subscriptions to endpoints that are not known to be without the instance.
func (s *Server) holders(instanceID string) []holder {
	var out []holder
	for _, st := range s.all() {
		st.mu.Lock()
		for _, url := range []string{xdsgen.EndpointsType, xdsgen.NodeServiceType} {
			t := st.session.types[url]
			if t == nil {
				continue
			}
			for name, u := range t.subs {
				_, dirty := t.dirty[name]
				switch {
				case dirty || u.claimed != "":
					out = append(out, holder{st, url, name, st.session.nonce + 1})
				case u.pending && u.sent != nil && u.sent.Holds(instanceID):
					out = append(out, holder{st, url, name, st.session.nonce + 1})
				case u.pending:
					out = append(out, holder{st, url, name, u.sentNonce})
				case u.acked != nil && u.acked.Holds(instanceID) && !u.absent:
					out = append(out, holder{st, url, name, st.session.nonce + 1})
				}
			}
		}
		st.mu.Unlock()
	}
	return out
}

// free says whether the client of a holder is now known to be without the instance.
func (h holder) free(instanceID string) bool {
	h.st.server.mu.Lock()
	left := h.st.left
	h.st.server.mu.Unlock()
	if left {
		return true
	}
	h.st.mu.Lock()
	defer h.st.mu.Unlock()
	t := h.st.session.types[h.url]
	u := t.subs[h.name]
	if u == nil {
		return true // unsubscribed
	}
	if u.acked != nil && u.acked.Holds(instanceID) {
		return u.absent && !u.pending // gone as a whole
	}
	if _, dirty := t.dirty[h.name]; dirty {
		return u.ackedNonce >= h.since
	}
	// Looked at and nothing to send: what the client has is what is published.
	return u.ackedNonce >= h.since || !u.pending && u.claimed == "" && u.rejected == ""
}
