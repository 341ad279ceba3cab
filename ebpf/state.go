package ebpf

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// The file of workloads: JSON, so that an operator can read it; format and version first.
const (
	stateFormat  = "inlay-workloads"
	stateVersion = 1
)

type stateFile struct {
	Format    string          `json:"format"`
	Version   int             `json:"version"`
	Root      string          `json:"root"`
	Workloads []stateWorkload `json:"workloads"`
}

type stateWorkload struct {
	RunID     string            `json:"runId"`
	Namespace string            `json:"namespace"`
	Service   string            `json:"service"`
	Labels    map[string]string `json:"labels,omitempty"`
	UID       uint32            `json:"uid"`
	Raw       bool              `json:"rawSockets,omitempty"`
	Cgroup    string            `json:"cgroup"`
	Admitted  time.Time         `json:"admitted"`
	// Left is set when the registration has ended and processes of it may still run.
	Left bool `json:"left,omitempty"`
}

// encodeState writes workloads in the order of their run ids.
func encodeState(root string, workloads map[string]*workload) ([]byte, error) {
	s := stateFile{Format: stateFormat, Version: stateVersion, Root: root, Workloads: []stateWorkload{}}
	for _, id := range slices.Sorted(maps.Keys(workloads)) {
		w := workloads[id]
		s.Workloads = append(s.Workloads, stateWorkload{
			RunID: w.RunID, Namespace: w.Namespace, Service: w.Service, Labels: w.labels, UID: w.UID, Raw: w.Raw,
			Cgroup: w.Cgroup, Admitted: w.admitted.UTC(), Left: w.left,
		})
	}
	b, err := json.MarshalIndent(s, "", "  ")
	return append(b, '\n'), err
}

// decodeState reads what encodeState wrote, for the managed cgroup root. It never panics.
func decodeState(b []byte, root string) (map[string]*workload, error) {
	var s stateFile
	if err := json.Unmarshal(b, &s); err != nil || s.Format != stateFormat {
		return nil, errors.New("it is not a list of Inlay's workloads, or damaged: remove it; what runs in managed cgroups is then unmanaged until it is started again")
	}
	switch {
	case s.Version > stateVersion:
		return nil, fmt.Errorf("format %d is newer than this program reads (%d): update it", s.Version, stateVersion)
	case s.Version < 1:
		return nil, fmt.Errorf("format %d: want 1 to %d", s.Version, stateVersion)
	case s.Root != root:
		return nil, fmt.Errorf("it is about the managed cgroup %s, this agent's is %s: pass --cgroup %s, or another state directory", s.Root, root, s.Root)
	}
	out := make(map[string]*workload, len(s.Workloads))
	for i, e := range s.Workloads {
		in := Admission{RunID: e.RunID, Namespace: e.Namespace, Service: e.Service, Labels: e.Labels, UID: e.UID, Raw: e.Raw}
		labels, err := in.check()
		if err == nil && e.Cgroup != filepath.Join(root, in.leaf()) {
			err = fmt.Errorf("cgroup %.200q: want %s", e.Cgroup, filepath.Join(root, in.leaf()))
		}
		if err == nil && out[e.RunID] != nil {
			err = fmt.Errorf("run %s stands twice", e.RunID)
		}
		if err != nil {
			return nil, fmt.Errorf("workload %d: %w", i, err)
		}
		in.Cgroup = e.Cgroup
		out[e.RunID] = &workload{Admission: in, labels: labels, admitted: e.Admitted, left: e.Left}
	}
	return out, nil
}

// openState makes the state directory and checks that nobody else can write it.
func openState(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("state directory: %w: choose another --state-dir", err)
	}
	return checkOwn("state directory", dir)
}

// checkOwn refuses a directory in which another user could put files in the place of the agent's: of
// the state, which says which cgroup is whose, or a link where the agent, as root, writes a log.
func checkOwn(what, dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if !info.IsDir() {
		return fmt.Errorf("%s %s: it is no directory: choose another", what, dir)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s %s belongs to user %d, who could put files there: want one of user %d: choose another, or run: chown %d %s", what, dir, st.Uid, os.Geteuid(), os.Geteuid(), dir)
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("%s %s: permissions %04o let others write: run: chmod go-w %s", what, dir, perm, dir)
	}
	return nil
}

// loadWorkloads reads the file of an agent before; none is no fault.
func (a *Agent) loadWorkloads(root string) (map[string]*workload, error) {
	path := filepath.Join(a.cfg.StateDir, workloadsFile)
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return map[string]*workload{}, nil
	case err != nil:
		return nil, fmt.Errorf("state: %w", err)
	}
	out, err := decodeState(b, root)
	if err != nil {
		return nil, fmt.Errorf("state %s: %w", path, err)
	}
	return out, nil
}

// saveWorkloads replaces the file. The lock is held.
func (a *Agent) saveWorkloads() error {
	b, err := encodeState(a.cgroups.root, a.workloads)
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if err := replaceFile(filepath.Join(a.cfg.StateDir, workloadsFile), b); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

// replaceFile writes a file of mode 0600 so that a reader and a crash see the old contents or the
// new, never a part. There is one writer at a time. What a crash left is taken by the next: a name of
// its own for each would fill the directory of an agent that is killed often.
func replaceFile(path string, b []byte) (err error) {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
