// Package bootstrap reads how a program reaches its control plane and who it is there: the gRPC
// xDS bootstrap JSON (gRFC A27 and later) and the INLAY_* variables, into one value. meshsdk, the
// node agent and `inlay bootstrap` call it. It opens no connection, reads no environment and no
// file but through the functions it is given, and nothing at init.
package bootstrap

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Kinds of channel credentials that this client can use. The first supported entry of a server's
// channel_creds is taken.
const (
	CredsInsecure = "insecure"   // plaintext: loopback and unix sockets
	CredsSVID     = "inlay_svid" // mutual TLS by the workload's X.509-SVID
	CredsTLS      = "tls"        // server-authenticated TLS by the system's roots
)

var supported = []string{CredsInsecure, CredsSVID, CredsTLS}

// Bootstrap is how to reach a control plane. It is immutable once read and safe to share.
type Bootstrap struct {
	// Servers in order of preference (gRFC A71). Empty when there is none, as with a snapshot file.
	Servers []Server
	Node    Node
	// CertificateProviders is the field certificate_providers as it was written; nil when absent.
	CertificateProviders json.RawMessage
	// ServerListenerTemplate is server_listener_resource_name_template; empty when absent.
	ServerListenerTemplate string
	// Source says where this came from, for texts: a file, a variable or a socket.
	Source string

	unknown map[string]json.RawMessage // other fields, kept for Encode
}

// Server is one entry of xds_servers.
type Server struct {
	// URI is a gRPC target: "host:port", "dns:///host:port", "unix:PATH".
	URI string
	// Creds is the first supported entry of channel_creds.
	Creds Creds
	// Features is server_features; words that nobody knows are kept and ignored (gRFC A30).
	Features []string

	allCreds json.RawMessage // channel_creds as written; nil for a server made from Creds
	unknown  map[string]json.RawMessage
}

// Creds is one entry of channel_creds.
type Creds struct {
	Type   string          // CredsInsecure, CredsSVID or CredsTLS
	Config json.RawMessage // as written; nil when absent
}

// Node is who the client says it is. The control plane believes the SVID where they disagree.
type Node struct {
	ID, Cluster string
	// Metadata values are JSON values as encoding/json decodes them.
	Metadata map[string]any
	Locality Locality

	unknown map[string]json.RawMessage
}

// Locality is where the client runs, the broadest first.
type Locality struct{ Region, Zone, SubZone string }

// Parse reads a bootstrap JSON. Errors name the field and what is accepted. Source is left empty.
func Parse(b []byte) (*Bootstrap, error) {
	fields, err := object(b)
	if err != nil {
		return nil, err
	}
	out := &Bootstrap{unknown: fields}
	servers, ok := take(fields, "xds_servers")
	if !ok {
		return nil, errors.New("xds_servers is missing: want a list with at least one server")
	}
	var list []json.RawMessage
	if err := json.Unmarshal(servers, &list); err != nil || len(list) == 0 {
		return nil, errors.New("xds_servers: want a list with at least one server")
	}
	for i, raw := range list {
		s, err := parseServer(raw)
		if err != nil {
			return nil, fmt.Errorf("xds_servers[%d]: %w", i, err)
		}
		out.Servers = append(out.Servers, *s)
	}
	if raw, ok := take(fields, "node"); ok {
		n, err := parseNode(raw)
		if err != nil {
			return nil, fmt.Errorf("node: %w", err)
		}
		out.Node = *n
	}
	if raw, ok := take(fields, "certificate_providers"); ok {
		if _, err := object(raw); err != nil {
			return nil, fmt.Errorf("certificate_providers: %w", err)
		}
		out.CertificateProviders = raw
	}
	if out.ServerListenerTemplate, err = takeText(fields, "server_listener_resource_name_template"); err != nil {
		return nil, err
	}
	return out, nil
}

func parseServer(b []byte) (*Server, error) {
	fields, err := object(b)
	if err != nil {
		return nil, err
	}
	s := &Server{unknown: fields}
	if s.URI, err = takeText(fields, "server_uri"); err != nil {
		return nil, err
	}
	if s.URI == "" {
		return nil, errors.New(`server_uri is missing or empty: want "host:port" or "unix:PATH"`)
	}
	raw, ok := take(fields, "channel_creds")
	var list []json.RawMessage
	if ok {
		err = json.Unmarshal(raw, &list)
	}
	if err != nil || len(list) == 0 {
		return nil, fmt.Errorf("channel_creds: want a list with at least one of %s", strings.Join(supported, ", "))
	}
	s.allCreds = raw
	var found []string
	for i, entry := range list {
		f, err := object(entry)
		if err != nil {
			return nil, fmt.Errorf("channel_creds[%d]: %w", i, err)
		}
		kind, err := takeText(f, "type")
		if err != nil {
			return nil, fmt.Errorf("channel_creds[%d]: %w", i, err)
		}
		found = append(found, fmt.Sprintf("%q", kind))
		// gRFC A27: "List of channel creds; client will stop at the first type it supports."
		if s.Creds.Type == "" && slices.Contains(supported, kind) {
			s.Creds = Creds{Type: kind, Config: f["config"]}
		}
	}
	if s.Creds.Type == "" {
		return nil, fmt.Errorf("channel_creds: none of %s is supported: want %s", strings.Join(found, ", "), strings.Join(supported, ", "))
	}
	if raw, ok := take(fields, "server_features"); ok {
		if err := json.Unmarshal(raw, &s.Features); err != nil {
			return nil, errors.New("server_features: want a list of strings")
		}
	}
	return s, nil
}

func parseNode(b []byte) (*Node, error) {
	fields, err := object(b)
	if err != nil {
		return nil, err
	}
	n := &Node{unknown: fields}
	if n.ID, err = takeText(fields, "id"); err != nil {
		return nil, err
	}
	if n.Cluster, err = takeText(fields, "cluster"); err != nil {
		return nil, err
	}
	if raw, ok := take(fields, "metadata"); ok {
		if err := json.Unmarshal(raw, &n.Metadata); err != nil {
			return nil, errors.New("metadata: want an object")
		}
	}
	raw, ok := fields["locality"]
	if !ok {
		return n, nil
	}
	loc, err := object(raw)
	if err != nil {
		return nil, fmt.Errorf("locality: %w", err)
	}
	for k, dst := range map[string]*string{"region": &n.Locality.Region, "zone": &n.Locality.Zone, "sub_zone": &n.Locality.SubZone} {
		if *dst, err = takeText(loc, k); err != nil {
			return nil, fmt.Errorf("locality: %w", err)
		}
	}
	delete(fields, "locality")
	return n, nil
}

// Encode writes b as a bootstrap JSON, with the fields that Parse did not know. It is
// deterministic; Parse of the result gives an equal value but for Source.
func (b *Bootstrap) Encode() ([]byte, error) {
	out := kept(b.unknown)
	servers := []json.RawMessage{}
	for i, s := range b.Servers {
		raw, err := s.encode()
		if err != nil {
			return nil, fmt.Errorf("xds_servers[%d]: %w", i, err)
		}
		servers = append(servers, raw)
	}
	out["xds_servers"] = servers
	node := kept(b.Node.unknown)
	setText(node, "id", b.Node.ID)
	setText(node, "cluster", b.Node.Cluster)
	if b.Node.Metadata != nil {
		node["metadata"] = b.Node.Metadata
	}
	loc := map[string]any{}
	setText(loc, "region", b.Node.Locality.Region)
	setText(loc, "zone", b.Node.Locality.Zone)
	setText(loc, "sub_zone", b.Node.Locality.SubZone)
	if len(loc) > 0 {
		node["locality"] = loc
	}
	if len(node) > 0 {
		out["node"] = node
	}
	if b.CertificateProviders != nil {
		out["certificate_providers"] = b.CertificateProviders
	}
	setText(out, "server_listener_resource_name_template", b.ServerListenerTemplate)
	raw, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return nil, err
	}
	return append(raw, '\n'), nil
}

func (s Server) encode() (json.RawMessage, error) {
	out := kept(s.unknown)
	out["server_uri"] = s.URI
	if s.allCreds != nil {
		out["channel_creds"] = s.allCreds
	} else {
		c := map[string]any{"type": s.Creds.Type}
		if s.Creds.Config != nil {
			c["config"] = s.Creds.Config
		}
		out["channel_creds"] = []any{c}
	}
	if s.Features != nil {
		out["server_features"] = s.Features
	}
	return json.Marshal(out)
}

// object reads one JSON object. Names are compared exactly, unlike by encoding/json's structs.
func object(b []byte) (map[string]json.RawMessage, error) {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(b, &m); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			line := 1 + bytes.Count(b[:min(int(syntax.Offset), len(b))], []byte("\n"))
			return nil, fmt.Errorf("line %d: %w: want a JSON object", line, err)
		}
		return nil, errors.New("want a JSON object")
	}
	if m == nil {
		return nil, errors.New("want a JSON object, not null")
	}
	return m, nil
}

// take removes a field; null counts as absent.
func take(m map[string]json.RawMessage, name string) (json.RawMessage, bool) {
	raw, ok := m[name]
	delete(m, name)
	return raw, ok && string(raw) != "null"
}

func takeText(m map[string]json.RawMessage, name string) (string, error) {
	raw, ok := take(m, name)
	if !ok {
		return "", nil
	}
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		return "", fmt.Errorf("%s: want a string", name)
	}
	return s, nil
}

func setText(m map[string]any, name, v string) {
	if v != "" {
		m[name] = v
	}
}

func kept(m map[string]json.RawMessage) map[string]any {
	out := make(map[string]any, len(m)+4)
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out[k] = m[k]
	}
	return out
}
