package bootstrap

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// ErrNotFound says that nothing names a control plane and no local one is running.
var ErrNotFound = errors.New("no control plane is known: start `inlay dev` on this machine, or set INLAY_ADDR=host:port, GRPC_XDS_BOOTSTRAP=FILE or INLAY_CONFIG=FILE")

// Env is what the INLAY_* variables say. It is a value.
type Env struct {
	// Service and Namespace are INLAY_SERVICE, "NAME" or "NAME.NAMESPACE"; empty when unset.
	Service, Namespace string
	// Labels is INLAY_LABELS, "k=v,k=v"; nil when unset. The label "version" is the version.
	Labels map[string]string
	// StateDir is INLAY_STATE_DIR, where the last known good is kept; empty when unset.
	StateDir string
	// Listen is INLAY_LISTEN, host:port; empty when unset.
	Listen string
	// Config is INLAY_CONFIG, a snapshot file; empty when unset.
	Config string
	// Disabled is INLAY_DISABLED.
	Disabled bool
	// Addr is INLAY_ADDR as written; empty when unset.
	Addr string
	// RunID is INLAY_RUN_ID, which `inlay run` sets for the program below it; empty when unset.
	RunID string
	// RunDir is where a node and a control plane of this machine have their sockets:
	// $XDG_RUNTIME_DIR/inlay, else ~/.inlay/run; empty when neither variable is set.
	RunDir string
	// WorkloadSocket is SPIFFE_ENDPOINT_SOCKET ("unix:///PATH" or "tcp://IP:PORT"), else
	// workload.sock in RunDir.
	WorkloadSocket string

	get func(string) string
}

// ReadEnv reads the variables through env, which is os.Getenv outside tests. All faults come
// together, each with the variable's name.
func ReadEnv(env func(string) string) (Env, error) {
	e := Env{get: env, StateDir: env("INLAY_STATE_DIR"), Config: env("INLAY_CONFIG"), Addr: env("INLAY_ADDR"),
		Listen: env("INLAY_LISTEN"), RunID: env("INLAY_RUN_ID"), RunDir: runDir(env)}
	var errs []error
	if v := env("INLAY_SERVICE"); v != "" {
		name, namespace, dotted := strings.Cut(v, ".")
		if name == "" || dotted && (namespace == "" || strings.Contains(namespace, ".")) {
			errs = append(errs, fmt.Errorf("INLAY_SERVICE=%q: want NAME or NAME.NAMESPACE", v))
		} else {
			e.Service, e.Namespace = name, namespace
		}
	}
	if v := env("INLAY_LABELS"); v != "" {
		e.Labels = map[string]string{}
		for pair := range strings.SplitSeq(v, ",") {
			k, val, ok := strings.Cut(strings.TrimSpace(pair), "=")
			if !ok || k == "" {
				errs = append(errs, fmt.Errorf("INLAY_LABELS: %q: want KEY=VALUE, separated by commas", pair))
				continue
			}
			e.Labels[k] = val
		}
	}
	if e.Listen != "" {
		if err := hostPort(e.Listen); err != nil {
			errs = append(errs, fmt.Errorf("INLAY_LISTEN: %w", err))
		}
	}
	if v := env("INLAY_DISABLED"); v != "" {
		b, err := strconv.ParseBool(v)
		if err != nil {
			errs = append(errs, fmt.Errorf("INLAY_DISABLED=%q: want 1 or 0", v))
		}
		e.Disabled = b
	}
	switch v := env("SPIFFE_ENDPOINT_SOCKET"); {
	case strings.HasPrefix(v, "unix:"), strings.HasPrefix(v, "tcp://"):
		e.WorkloadSocket = v
	case v != "":
		// SPIFFE Workload Endpoint, section 4: the value is a URI with the scheme unix or tcp.
		errs = append(errs, fmt.Errorf("SPIFFE_ENDPOINT_SOCKET=%q: want unix:///PATH or tcp://IP:PORT", v))
	case e.RunDir != "":
		e.WorkloadSocket = "unix://" + filepath.Join(e.RunDir, "workload.sock")
	}
	return e, errors.Join(errs...)
}

// AddrOf is INLAY_ADDR_<SERVICE>, where a service is reached while the mesh is disabled. The name
// is in upper case with '_' for every byte that is not a letter or digit. Empty when unset.
func (e Env) AddrOf(service string) (string, error) {
	if e.get == nil {
		return "", nil
	}
	name := []byte("INLAY_ADDR_" + strings.ToUpper(service))
	for i, c := range name {
		if (c < 'A' || c > 'Z') && (c < '0' || c > '9') {
			name[i] = '_'
		}
	}
	v := e.get(string(name))
	if v == "" {
		return "", nil
	}
	if err := hostPort(v); err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	return v, nil
}

func runDir(env func(string) string) string {
	if d := env("XDG_RUNTIME_DIR"); d != "" {
		return filepath.Join(d, "inlay")
	}
	if h := env("HOME"); h != "" {
		return filepath.Join(h, ".inlay", "run")
	}
	return ""
}

func hostPort(s string) error {
	_, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("%q: want HOST:PORT", s)
	}
	return nil
}

// Load finds the control plane. First match: GRPC_XDS_BOOTSTRAP (a file), GRPC_XDS_BOOTSTRAP_CONFIG
// (the JSON itself), INLAY_ADDR, the socket controlplane.sock in Env.RunDir if it is there, and
// INLAY_CONFIG, which needs no server. ErrNotFound otherwise. env and readFile are os.Getenv and
// os.ReadFile outside tests. A wrong value is an error that names its place; Load never goes on
// to the next source after one.
func Load(env func(string) string, readFile func(string) ([]byte, error)) (*Bootstrap, error) {
	e, err := ReadEnv(env)
	if err != nil {
		return nil, err
	}
	b, err := find(e, env, readFile)
	if err != nil {
		return nil, err
	}
	b.Node = e.node(b.Node)
	return b, nil
}

func find(e Env, env func(string) string, readFile func(string) ([]byte, error)) (*Bootstrap, error) {
	if file := env("GRPC_XDS_BOOTSTRAP"); file != "" {
		// gRFC A27: the variable with the file's name wins over the one with the contents.
		raw, err := readFile(file)
		if err != nil {
			return nil, fmt.Errorf("GRPC_XDS_BOOTSTRAP: %w: write it with `inlay bootstrap --service NAME -o %s`, or unset the variable", err, file)
		}
		b, err := Parse(raw)
		if err != nil {
			return nil, fmt.Errorf("bootstrap file %s (GRPC_XDS_BOOTSTRAP): %w", file, err)
		}
		b.Source = "file " + file + " (GRPC_XDS_BOOTSTRAP)"
		return b, nil
	}
	if raw := env("GRPC_XDS_BOOTSTRAP_CONFIG"); raw != "" {
		b, err := Parse([]byte(raw))
		if err != nil {
			return nil, fmt.Errorf("GRPC_XDS_BOOTSTRAP_CONFIG: %w", err)
		}
		b.Source = "GRPC_XDS_BOOTSTRAP_CONFIG"
		return b, nil
	}
	if e.Addr != "" {
		s, err := ServerAt(e.Addr)
		if err != nil {
			return nil, fmt.Errorf("INLAY_ADDR: %w", err)
		}
		return &Bootstrap{Servers: []Server{s}, Source: "INLAY_ADDR=" + e.Addr}, nil
	}
	if e.RunDir != "" {
		sock := filepath.Join(e.RunDir, "controlplane.sock")
		// Reading a socket fails; the way it fails says whether it is there.
		if _, err := readFile(sock); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			s, err := ServerAt("unix:" + sock)
			return &Bootstrap{Servers: []Server{s}, Source: "socket " + sock}, err
		}
	}
	if e.Config != "" {
		return &Bootstrap{Source: "INLAY_CONFIG=" + e.Config}, nil
	}
	return nil, ErrNotFound
}

// ServerAt makes a server of an address as INLAY_ADDR has it: "host:port" is reached by mutual TLS
// with the SVID, "unix:PATH" in plaintext (the kernel vouches for the caller there).
func ServerAt(addr string) (Server, error) {
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		if path = "/" + strings.TrimLeft(path, "/"); !strings.HasPrefix(addr, "unix:/") {
			return Server{}, fmt.Errorf("%q: want unix:PATH with an absolute path", addr)
		}
		return Server{URI: "unix:" + path, Creds: Creds{Type: CredsInsecure}}, nil
	}
	if err := hostPort(addr); err != nil {
		return Server{}, fmt.Errorf("%w or unix:PATH", err)
	}
	return Server{URI: addr, Creds: Creds{Type: CredsSVID}}, nil
}

// Names in the node metadata.
const (
	MetadataNamespace = "INLAY_NAMESPACE"
	MetadataService   = "INLAY_SERVICE"
	MetadataVersion   = "INLAY_VERSION"
	MetadataLabels    = "INLAY_LABELS"
)

// node adds what the environment says to a node; what the bootstrap says itself wins.
func (e Env) node(n Node) Node {
	md := make(map[string]any, len(n.Metadata)+4)
	set := func(k string, v any, ok bool) {
		if ok {
			md[k] = v
		}
	}
	set(MetadataService, e.Service, e.Service != "")
	set(MetadataNamespace, e.Namespace, e.Namespace != "")
	set(MetadataVersion, e.Labels["version"], e.Labels["version"] != "")
	labels := make(map[string]any, len(e.Labels))
	for k, v := range e.Labels {
		labels[k] = v
	}
	set(MetadataLabels, labels, len(labels) > 0)
	for k, v := range n.Metadata {
		md[k] = v
	}
	if len(md) > 0 {
		n.Metadata = md
	}
	return n
}

// Client is what a bootstrap for a stock gRPC client says.
type Client struct {
	ServerURI          string // plaintext; "host:port"
	NodeID             string
	Service, Namespace string // Namespace empty means that of the control plane's default
}

// ServerListenerTemplate is the name by which a stock gRPC server asks for its listener.
const ServerListenerTemplate = "grpc/server?xds.resource.listening_address=%s"

// Generate writes the bootstrap JSON of a stock gRPC client or server.
func Generate(c Client) ([]byte, error) {
	if c.ServerURI == "" || c.NodeID == "" || c.Service == "" {
		return nil, fmt.Errorf("bootstrap: server %q, node id %q, service %q: want all three", c.ServerURI, c.NodeID, c.Service)
	}
	b := Bootstrap{
		Servers:                []Server{{URI: c.ServerURI, Creds: Creds{Type: CredsInsecure}, Features: []string{"xds_v3"}}},
		Node:                   Node{ID: c.NodeID, Metadata: map[string]any{MetadataService: c.Service}},
		ServerListenerTemplate: ServerListenerTemplate,
	}
	if c.Namespace != "" {
		b.Node.Metadata[MetadataNamespace] = c.Namespace
	}
	return b.Encode()
}

// Has says whether the server announces a feature.
func (s Server) Has(feature string) bool { return slices.Contains(s.Features, feature) }
