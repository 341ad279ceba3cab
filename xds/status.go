package xds

import (
	"cmp"
	"slices"
	"time"
)

// Status is what a Client has and from where. It is a value.
type Status struct {
	// Server in use or last used; empty before the first connection and without servers.
	Server    string
	Connected bool
	// Since is when the present connection was made; zero when there is none.
	Since time.Time
	// Mode is "delta" or "sotw"; empty without servers.
	Mode string
	// Err is why the last attempt to reach a server failed; nil while connected.
	Err error
	// LoadedFrom is the file that stored resources came from, and LoadedWritten when it was
	// written; empty when no file is in use.
	LoadedFrom    string
	LoadedWritten time.Time
	// Resources by type, then name.
	Resources []ResourceStatus
}

// ResourceStatus is one watched resource.
type ResourceStatus struct {
	Type, Name string
	Version    string // of the value in use; empty when there is none
	// Updated is when the present state came; zero while nothing is known. Its distance from now
	// is the age.
	Updated time.Time
	// Cached says that the value is from disk and no server has sent it in this process; a server
	// that was told its version and had nothing newer sends nothing.
	Cached bool
	// Err says why there is no value; nil when there is one or nothing is known yet.
	Err error
	// Rejected is the text of the NACK of the newest bytes, RejectedVersion their version; empty
	// when the newest were taken.
	Rejected, RejectedVersion string
	// NotHonoured lists the fields of the value that this client does not act on.
	NotHonoured []string
}

// Connected says whether a server is connected now. Unlike Status it costs nothing a resource.
func (c *Client) Connected() bool { return c.stream != nil && c.stream.Status().Connected }

// Status tells what the client has. It never blocks on the network.
func (c *Client) Status() Status {
	var st Status
	if c.stream != nil {
		s := c.stream.Status()
		st.Server, st.Connected, st.Since, st.Mode, st.Err = s.Server, s.Connected, s.Since, s.Mode.String(), s.Err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.cfg.Snapshot != nil:
		st.LoadedFrom, st.LoadedWritten = c.cfg.Snapshot.Path, c.cfg.Snapshot.Meta.Written
	case c.cache != nil:
		if w := c.cache.loaded(); !w.IsZero() {
			st.LoadedFrom, st.LoadedWritten = c.cache.cfg.Path, w
		}
	}
	for k, e := range c.entries {
		r := ResourceStatus{Type: k.Type, Name: k.Name, Version: e.version, Updated: e.updated, Cached: e.cached, Err: e.err,
			Rejected: e.rejected, RejectedVersion: e.rejectedVersion}
		if e.value != nil {
			r.NotHonoured = e.value.NotHonoured
		}
		st.Resources = append(st.Resources, r)
	}
	slices.SortFunc(st.Resources, func(a, b ResourceStatus) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Name, b.Name))
	})
	return st
}
