package workload

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
)

// managedFile remembers managed runs in the run directory, which ends with the machine as the
// programs do: a node that starts again knows those whose `inlay run` is gone, too.
const managedFile = "managed.json"

// The first words of the file.
const (
	managedFormat  = "inlay-managed-runs"
	managedVersion = 1
)

type managedState struct {
	Format  string       `json:"format"`
	Version int          `json:"version"`
	Runs    []managedRun `json:"runs"`
}

// managedRun is one run as the file has it.
type managedRun struct {
	RunID     string            `json:"runId"`
	Namespace string            `json:"namespace"`
	Service   string            `json:"service"`
	Version   string            `json:"version,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	UID       uint32            `json:"uid"`
	Raw       bool              `json:"rawSockets,omitempty"`
	Cgroup    string            `json:"cgroup"`
	// Root is the process that registered; it may come back.
	Root attest.Process `json:"root"`
	// Port is 0 until the program listens.
	Port    uint16         `json:"port,omitempty"`
	Address netip.AddrPort `json:"address,omitzero"`
	UDP     bool           `json:"udp,omitempty"`
}

// start is the run as it was asked for; an error says what in the file cannot be.
func (r managedRun) start() (startRequest, error) {
	svc, err := newService(r.Namespace, r.Service)
	switch {
	case err != nil:
	case r.RunID == "" || len(r.RunID) > 128:
		err = errors.New("run id: want 1 to 128 characters")
	case !filepath.IsAbs(r.Cgroup):
		err = errors.New("cgroup: want an absolute path")
	case (r.Port != 0) != (r.Address.IsValid() && r.Address.Port() != 0):
		err = errors.New("port and address: want both or none")
	}
	if err != nil {
		return startRequest{}, fmt.Errorf("run %q: %w", r.RunID, err)
	}
	return startRequest{
		svc: svc, version: r.Version, labels: r.Labels, runID: r.RunID,
		managed: &managedStart{uid: r.UID, raw: r.Raw, cgroup: r.Cgroup},
	}, nil
}

// decodeManaged reads the file. Runs that cannot be are left out, and told.
func decodeManaged(raw []byte) ([]managedRun, error) {
	var s managedState
	if err := json.Unmarshal(raw, &s); err != nil || s.Format != managedFormat {
		return nil, fmt.Errorf("not a list of managed runs (%w)", cmp.Or(err, errors.New("another format")))
	}
	if s.Version != managedVersion {
		return nil, fmt.Errorf("version %d: want %d", s.Version, managedVersion)
	}
	var errs []error
	runs := slices.DeleteFunc(s.Runs, func(r managedRun) bool {
		_, err := r.start()
		errs = append(errs, err)
		return err != nil
	})
	return runs, errors.Join(errs...)
}

// remember changes what is known of managed runs, and the file with it. A file that cannot be
// written costs a later node its memory, nothing now.
func (n *Node) remember(change func(runs map[string]managedRun)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change(n.managed)
	s := managedState{Format: managedFormat, Version: managedVersion, Runs: []managedRun{}}
	for _, id := range slices.Sorted(maps.Keys(n.managed)) {
		s.Runs = append(s.Runs, n.managed[id])
	}
	raw, err := json.MarshalIndent(s, "", "  ")
	if err == nil {
		err = replaceFile(filepath.Join(n.cfg.RunDir, managedFile), append(raw, '\n'))
	}
	if err != nil {
		n.log.Warn("managed runs not remembered: a node that starts again will not know them", "err", err)
	}
}

// replaceFile writes a file whole or not at all. There is one writer at a time; what a crash left is
// taken by the next.
func replaceFile(path string, raw []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

func (n *Node) rememberStart(start startRequest, reg *registration) {
	n.remember(func(runs map[string]managedRun) {
		was := runs[start.runID] // its port, of before a reconnection
		runs[start.runID] = managedRun{
			RunID: start.runID, Namespace: start.svc.namespace, Service: start.svc.name, Version: start.version, Labels: start.labels,
			UID: start.managed.uid, Raw: start.managed.raw, Cgroup: reg.cgroup, Root: reg.root,
			Port: was.Port, Address: was.Address, UDP: was.UDP,
		}
	})
}

func (n *Node) rememberPort(runID string, b binding) {
	n.remember(func(runs map[string]managedRun) {
		if r, ok := runs[runID]; ok {
			r.Port, r.Address, r.UDP = b.port, b.address, b.udp
			runs[runID] = r
		}
	})
}

// recall takes over the managed runs of a node before this one whose programs live. They are what
// they were at once; each ends when its cgroup is empty, or when its `inlay run` comes back and
// takes its place.
func (n *Node) recall(ctx context.Context) {
	if n.cfg.Cgroups == nil {
		return
	}
	path := filepath.Join(n.cfg.RunDir, managedFile)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var runs []managedRun
	if err == nil {
		runs, err = decodeManaged(raw)
	}
	if err != nil {
		n.log.WarnContext(ctx, "managed runs of before are not all known", "file", path, "err", err)
	}
	for _, r := range runs {
		if live, err := attest.Populated(r.Cgroup); err != nil || !live {
			continue
		}
		start, err := r.start()
		if err != nil {
			continue // decodeManaged has told
		}
		n.takeOver(ctx, r, start)
	}
}

func (n *Node) takeOver(ctx context.Context, r managedRun, start startRequest) {
	id, err := n.id(start.svc)
	if err != nil {
		n.log.WarnContext(ctx, "managed run not taken over", "run_id", r.RunID, "err", err)
		return
	}
	if !allowed(n.cfg.Users, r.UID, start.svc) {
		n.log.WarnContext(ctx, "registration refused", "uid", r.UID, "service", start.svc.String(), "run_id", r.RunID, "cgroup", r.Cgroup,
			"reason", "its user may not run the service any more")
		return
	}
	reg := &registration{
		root: r.Root, uid: r.UID, svc: start.svc, runID: r.RunID, cgroup: r.Cgroup,
		entry: n.issuer.acquire(start.svc, id, r.UID), ended: make(chan struct{}),
	}
	if err := n.regs.add(reg); err != nil {
		n.issuer.release(reg.entry)
		n.log.WarnContext(ctx, "managed run not taken over", "run_id", r.RunID, "err", err)
		return
	}
	n.enlist(start)
	if r.Port != 0 {
		n.announce(start, binding{port: r.Port, address: r.Address, udp: r.UDP})
	}
	n.rememberStart(start, reg)
	if r.Port != 0 {
		n.rememberPort(r.RunID, binding{port: r.Port, address: r.Address, udp: r.UDP})
	}
	n.log.InfoContext(ctx, "managed run taken over", "service", start.svc.String(), "uid", r.UID, "run_id", r.RunID, "cgroup", r.Cgroup)
	n.wg.Go(func() {
		// The agent remembers the cgroup by itself; this says that somebody still stands for it.
		switch _, err := n.cfg.Cgroups.Admit(n.workers, start.admission()); {
		case errors.Is(err, ErrRefused):
			n.log.Warn("managed run not taken over", "run_id", r.RunID, "err", err)
			n.end(n.workers, reg)
			return
		case err != nil && n.workers.Err() == nil:
			n.log.Warn("cgroup of a managed run not admitted again: it stays what it was", "run_id", r.RunID, "err", err)
		}
		n.retire(n.workers, reg)
	})
}
