package meshsdk

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
)

// settings is what options and environment say together: checked, and read once by Open.
type settings struct {
	options
	env bootstrap.Env
	// boot has no servers when a snapshot file serves in place of a control plane.
	boot *bootstrap.Bootstrap
	// service and namespace as they were said; empty when the SVID has to say it.
	service, namespace string
	disabled           bool
	// stateBase is the directory that holds one for each service; stateDir, when not empty, is the
	// directory itself.
	stateBase, stateDir string
	// workload is the socket of the Workload API; empty when there is none.
	workload string
}

// resolve makes one value of options and environment. It opens nothing but the bootstrap file.
// All faults come together.
func resolve(o options, readFile func(string) ([]byte, error)) (*settings, error) {
	if o.getenv == nil {
		o.getenv = os.Getenv
	}
	if o.log == nil {
		o.log = slog.Default()
	}
	if o.clock == nil {
		o.clock = realClock{}
	}
	s := &settings{options: o}
	var errs []error
	env, err := bootstrap.ReadEnv(o.getenv)
	if err != nil {
		errs = append(errs, err)
	}
	s.env = env
	s.service, s.namespace = env.Service, env.Namespace
	if o.service != "" {
		s.service, s.namespace, _ = strings.Cut(o.service, ".")
		if err := checkService(s.service, s.namespace); err != nil {
			errs = append(errs, fmt.Errorf("WithService(%q): %w", o.service, err))
		}
	} else if s.service != "" {
		if err := checkService(s.service, s.namespace); err != nil {
			errs = append(errs, fmt.Errorf("INLAY_SERVICE=%q: %w", o.getenv("INLAY_SERVICE"), err))
		}
	}
	s.disabled = env.Disabled
	if o.disabled != nil {
		s.disabled = *o.disabled
	}
	if s.options.listen == "" {
		s.options.listen = env.Listen
	} else if err := checkHostPort(s.options.listen); err != nil {
		errs = append(errs, fmt.Errorf("WithListen: %w", err))
	}
	labels := maps.Clone(env.Labels)
	if labels == nil {
		labels = make(map[string]string, len(o.labels))
	}
	maps.Copy(labels, o.labels)
	s.options.labels = labels
	if s.options.configFile == "" {
		s.options.configFile = env.Config
	}
	s.stateDir = o.stateDir
	if s.stateDir == "" {
		s.stateDir = env.StateDir
	}
	s.stateBase = stateBase(o.getenv)
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if s.disabled {
		s.boot = &bootstrap.Bootstrap{Source: "disabled"}
		return s, nil
	}
	if s.workload, err = s.workloadSocketOf(readFile); err != nil {
		return nil, err
	}
	s.boot, err = s.bootstrap(readFile)
	return s, err
}

func checkService(service, namespace string) error {
	if err := identity.CheckName(service); err != nil {
		return fmt.Errorf("service %q: %w", service, err)
	}
	if namespace != "" {
		if err := identity.CheckName(namespace); err != nil {
			return fmt.Errorf("namespace %q: %w", namespace, err)
		}
	}
	return nil
}

func checkHostPort(s string) error {
	_, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("%q: want HOST:PORT, as 127.0.0.1:0", s)
	}
	return nil
}

// stateBase is where programs keep state (XDG Base Directory Specification: "$XDG_STATE_HOME
// defines the base directory relative to which user-specific state files should be stored. If
// $XDG_STATE_HOME is either not set or empty, a default equal to $HOME/.local/state should be
// used"). Empty when neither is set: nothing is kept then.
func stateBase(getenv func(string) string) string {
	// "All paths set in these environment variables must be absolute. If an implementation
	// encounters a relative path in any of these variables it should consider the path invalid and
	// ignore it."
	if d := getenv("XDG_STATE_HOME"); filepath.IsAbs(d) {
		return filepath.Join(d, "inlay")
	}
	if h := getenv("HOME"); filepath.IsAbs(h) {
		return filepath.Join(h, ".local", "state", "inlay")
	}
	return ""
}

// stateDirOf is where the state of one service is kept; empty keeps nothing.
func (s *settings) stateDirOf(namespace, service string) string {
	if s.stateDir != "" || s.stateBase == "" {
		return s.stateDir
	}
	return filepath.Join(s.stateBase, namespace+"."+service)
}

// workloadSocketOf finds the Workload API. One that nobody named is used only when it is there: a
// program outside any node has no identity, and does not knock for ever.
func (s *settings) workloadSocketOf(readFile func(string) ([]byte, error)) (string, error) {
	if s.identity != nil {
		return "", nil
	}
	if addr := s.options.workloadSocket; addr != "" {
		if _, _, err := identity.ParseSocket(addr); err != nil {
			return "", fmt.Errorf("WithWorkloadSocket: %w", err)
		}
		return addr, nil
	}
	addr := s.env.WorkloadSocket
	if addr == "" {
		return "", nil
	}
	_, path, err := identity.ParseSocket(addr)
	if err != nil {
		return "", err
	}
	if s.getenv("SPIFFE_ENDPOINT_SOCKET") == "" && !exists(path, readFile) {
		return "", nil
	}
	return addr, nil
}

// exists asks by reading: reading a socket fails, and the way it fails says whether it is there.
func exists(path string, readFile func(string) ([]byte, error)) bool {
	_, err := readFile(path)
	return !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR)
}

// bootstrap finds the control plane. First match: a snapshot file (none is needed), WithControlPlane,
// WithBootstrap, then the environment.
func (s *settings) bootstrap(readFile func(string) ([]byte, error)) (*bootstrap.Bootstrap, error) {
	switch {
	case s.configFile != "":
		return &bootstrap.Bootstrap{Source: "snapshot file " + s.configFile}, nil
	case s.controlPlane != "":
		srv, err := bootstrap.ServerAt(s.controlPlane)
		if err != nil {
			return nil, fmt.Errorf("WithControlPlane: %w", err)
		}
		return &bootstrap.Bootstrap{Servers: []bootstrap.Server{srv}, Source: "WithControlPlane(" + s.controlPlane + ")"}, nil
	case s.options.bootstrap != nil:
		b, err := bootstrap.Parse(s.options.bootstrap)
		if err != nil {
			return nil, fmt.Errorf("WithBootstrap: %w", err)
		}
		b.Source = "WithBootstrap"
		return b, nil
	}
	b, err := bootstrap.Load(s.getenv, readFile)
	if errors.Is(err, bootstrap.ErrNotFound) && s.env.RunDir != "" && s.workload != "" {
		// A node runs here, so the control plane of this machine is only away: its socket appears
		// where it always is, and the last known good serves until then.
		sock := filepath.Join(s.env.RunDir, "controlplane.sock")
		srv, err := bootstrap.ServerAt("unix:" + sock)
		if err != nil {
			return nil, err
		}
		return &bootstrap.Bootstrap{Servers: []bootstrap.Server{srv}, Source: "socket " + sock + " (not there yet)"}, nil
	}
	return b, err
}

// self is who this process is. It is known once the SVID is, or at once where there is none to
// wait for.
type self struct {
	namespace, service string
	// spiffeID is empty without an identity.
	spiffeID    string
	trustDomain string
}

// name is "service.namespace".
func (w self) name() string { return w.service + "." + w.namespace }

// selfOf decides who we are: by the SVID, which must agree with what was said, else by what was
// said alone (svid nil).
func (s *settings) selfOf(svid *identity.SVID) (self, error) {
	if svid == nil {
		namespace := s.namespace
		if namespace == "" {
			namespace = "default"
		}
		if s.service == "" {
			return self{}, errors.New("which service is this? Neither an SVID nor WithService nor INLAY_SERVICE says: start the program with: inlay run --service NAME -- CMD")
		}
		return self{namespace: namespace, service: s.service}, nil
	}
	namespace, service, ok := identity.ParseServiceID(svid.ID)
	if !ok {
		return self{}, fmt.Errorf("SVID %s names no service: want spiffe://TRUST_DOMAIN/ns/NAMESPACE/svc/SERVICE", svid.ID)
	}
	if s.service != "" && s.service != service || s.namespace != "" && s.namespace != namespace {
		said := s.service
		if s.namespace != "" {
			said += "." + s.namespace
		}
		return self{}, fmt.Errorf("this process says it is %q, its SVID is %s: start it with: inlay run --service %s -- CMD, or change WithService or INLAY_SERVICE to %s", said, svid.ID, s.service, service)
	}
	return self{namespace: namespace, service: service, spiffeID: svid.ID.String(), trustDomain: svid.ID.TrustDomain().Name()}, nil
}

// spiffeIDOf reads the SPIFFE ID of a snapshot; the zero ID for none.
func spiffeIDOf(s string) (spiffeid.ID, error) {
	if s == "" {
		return spiffeid.ID{}, nil
	}
	return spiffeid.FromString(s)
}
