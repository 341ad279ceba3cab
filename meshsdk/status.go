package meshsdk

import (
	"cmp"
	"slices"
	"time"

	"github.com/inlay-mesh/inlay/xds"
)

// Status is a Mesh at one moment: a value, for people and probes. Its JSON names are those of the
// CLI.
type Status struct {
	// Service and Namespace are empty until the identity says them.
	Service    string `json:"service,omitempty"`
	Namespace  string `json:"namespace,omitempty"`
	InstanceID string `json:"instanceId"`
	SDKVersion string `json:"sdkVersion"`
	// Stage is "open", "draining" or "closed", or "disabled".
	Stage string `json:"stage"`
	// Ready is what readyz says, NotReady why not.
	Ready        bool               `json:"ready"`
	NotReady     string             `json:"notReady,omitempty"`
	Identity     IdentityStatus     `json:"identity"`
	ControlPlane ControlPlaneStatus `json:"controlPlane"`
	Config       ConfigStatus       `json:"config"`
	// Listeners are the ports of this service that are served, by port.
	Listeners   []ListenerStatus `json:"listeners,omitempty"`
	Connections ConnectionCounts `json:"connections"`
	// InFlight is how many calls the servers of this process answer now.
	InFlight int64 `json:"inFlight"`
	// Namespaces of the mesh, as announced.
	Namespaces []string `json:"namespaces,omitempty"`
}

// IdentityStatus is the SVID, or why there is none.
type IdentityStatus struct {
	SPIFFEID string    `json:"spiffeId,omitempty"`
	Expires  time.Time `json:"expires,omitzero"`
	Error    string    `json:"error,omitempty"`
}

// ControlPlaneStatus is the connection to it.
type ControlPlaneStatus struct {
	// Source says where its address comes from.
	Source    string    `json:"source"`
	Server    string    `json:"server,omitempty"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since,omitzero"`
	Error     string    `json:"error,omitempty"`
}

// ConfigStatus is the configuration in use.
type ConfigStatus struct {
	// LoadedFrom is "control-plane", "cache" or "file"; empty while there is none.
	LoadedFrom string `json:"loadedFrom,omitempty"`
	// File is that of the cache or snapshot, Written when it was written.
	File    string    `json:"file,omitempty"`
	Written time.Time `json:"written,omitzero"`
	// Error says why stored configuration was refused, or why there will be none.
	Error     string           `json:"error,omitempty"`
	Resources []ResourceStatus `json:"resources,omitempty"`
}

// ResourceStatus is one xDS resource that is in use or was rejected.
type ResourceStatus struct {
	TypeURL string `json:"typeUrl"`
	Name    string `json:"name"`
	Version string `json:"version,omitempty"`
	// Updated is when the present state came; its distance from now is the age.
	Updated time.Time `json:"updated,omitzero"`
	// Cached says that it is from disk and was not confirmed since.
	Cached bool `json:"cached,omitempty"`
	// Error is the text of the NACK, or why there is no value.
	Error string `json:"error,omitempty"`
	// NotHonoured are the fields that this client read past.
	NotHonoured []string `json:"notHonoured,omitempty"`
}

// ListenerStatus is one port.
type ListenerStatus struct {
	Port    uint16 `json:"port"`
	Address string `json:"address"`
	// Mode is "strict" or "permissive" (or "plaintext", "closed" by a foreign control plane).
	Mode string `json:"mode"`
	// ModeError says why the mode is not known; it is strict then.
	ModeError  string `json:"modeError,omitempty"`
	Registered bool   `json:"registered"`
	// Unreachable is the registry's reason why nobody will call this instance.
	Unreachable string `json:"unreachable,omitempty"`
	// RegisterError is why it is not registered.
	RegisterError string `json:"registerError,omitempty"`
}

// ConnectionCounts count the connections to all listeners since Open.
type ConnectionCounts struct {
	MTLS      int64 `json:"mtls"`
	Plaintext int64 `json:"plaintext"`
	// Refused were plaintext to a strict service, Failed broke before or in the handshake.
	Refused int64 `json:"refused"`
	Failed  int64 `json:"failed"`
}

// Status says how the Mesh stands. It asks nobody and blocks on nothing.
func (m *Mesh) Status() Status {
	st := Status{
		InstanceID: m.instanceID,
		SDKVersion: sdkVersion(),
		Stage:      [...]string{"open", "draining", "closed"}[m.stage.Load()],
		InFlight:   m.gate.InFlight(),
		Connections: ConnectionCounts{
			MTLS:      m.inbound.MTLS.Load(),
			Plaintext: m.inbound.Plaintext.Load(),
			Refused:   m.inbound.Refused.Load(),
			Failed:    m.inbound.Failed.Load(),
		},
		ControlPlane: ControlPlaneStatus{Source: m.set.boot.Source},
	}
	m.mu.Lock()
	st.Service, st.Namespace = m.who.service, m.who.namespace
	client, failure, cacheErr, loaded := m.xds, m.failure, m.cacheErr, m.loaded
	type lis struct {
		in   *inbound
		addr string
	}
	var listeners []lis
	for l, in := range m.listeners {
		listeners = append(listeners, lis{in, l.Addr().String()})
	}
	m.mu.Unlock()

	if m.set.disabled {
		if st.Stage == "open" {
			st.Stage, st.Ready = "disabled", true
		}
		return st
	}
	if why := m.notReady(); why != nil {
		st.NotReady = why.Error()
	} else {
		st.Ready = true
	}
	if svid, err := m.source.Current(); err == nil {
		st.Identity = IdentityStatus{SPIFFEID: svid.ID.String(), Expires: svid.NotAfter()}
	} else {
		st.Identity.Error = err.Error()
	}
	st.Namespaces = m.names.list()
	switch {
	case failure != nil:
		st.Config.Error = failure.Error()
	case cacheErr != nil:
		st.Config.Error = cacheErr.Error()
	}
	if client != nil {
		st.fill(client.Status(), m.snapshot != nil, loaded)
	}
	reg := m.registrar.status()
	for _, l := range listeners {
		mode, err := l.in.state()
		ls := ListenerStatus{
			Port: l.in.port, Address: l.addr, Mode: mode.String(),
			Registered: reg.registered && m.registrar.has(l.in.port), Unreachable: reg.unreachable, RegisterError: reg.err,
		}
		if err != nil {
			ls.ModeError = err.Error()
		}
		st.Listeners = append(st.Listeners, ls)
	}
	slices.SortFunc(st.Listeners, func(a, b ListenerStatus) int { return cmp.Compare(a.Port, b.Port) })
	return st
}

// fill takes in what the client of the control plane says.
func (st *Status) fill(c xds.Status, snapshot, loaded bool) {
	st.ControlPlane.Server, st.ControlPlane.Connected, st.ControlPlane.Since = c.Server, c.Connected, c.Since
	if c.Err != nil {
		st.ControlPlane.Error = c.Err.Error()
	}
	if loaded {
		st.Config.LoadedFrom = loadedFrom(c, snapshot)
	}
	st.Config.File, st.Config.Written = c.LoadedFrom, c.LoadedWritten
	for _, r := range c.Resources {
		rs := ResourceStatus{
			TypeURL: r.Type, Name: r.Name, Version: r.Version, Updated: r.Updated, Cached: r.Cached,
			Error: r.Rejected, NotHonoured: r.NotHonoured,
		}
		if rs.Error == "" && r.Err != nil {
			rs.Error = r.Err.Error()
		}
		st.Config.Resources = append(st.Config.Resources, rs)
	}
}

// notReady says why traffic should not come to this process; nil when it may.
func (m *Mesh) notReady() error {
	if m.stage.Load() != stageOpen {
		return errClosed
	}
	if m.set.disabled {
		return nil
	}
	m.mu.Lock()
	failure, loaded := m.failure, m.loaded
	m.mu.Unlock()
	if failure != nil {
		return failure
	}
	if m.expectsIdentity() {
		if _, err := m.source.Current(); err != nil {
			return err
		}
	}
	if !loaded {
		if err := m.missing(); err != nil {
			return err
		}
		return errNoConfig
	}
	return nil
}
