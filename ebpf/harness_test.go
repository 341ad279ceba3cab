package ebpf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/tables"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	"github.com/inlay-mesh/inlay/xds/xdspb"
)

// patience bounds the wait for an event of the test's own process.
const patience = 20 * time.Second

// notice is a condition over shared state, looked at whenever the state changes.
type notice struct {
	mu      sync.Mutex
	changed chan struct{}
}

func (n *notice) wake() {
	if n.changed != nil {
		close(n.changed)
		n.changed = nil
	}
}

// until waits for ok, which is called with the lock held.
func (n *notice) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	late := time.After(patience)
	for {
		n.mu.Lock()
		if ok() {
			n.mu.Unlock()
			return
		}
		if n.changed == nil {
			n.changed = make(chan struct{})
		}
		changed := n.changed
		n.mu.Unlock()
		select {
		case <-changed:
		case <-late:
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

// testClock is moved by hand, on top of a base.
type testClock struct {
	notice
	now    time.Time
	timers []*testTimer
}

type testTimer struct {
	at time.Time
	f  func()
}

func newTestClock() *testClock { return &testClock{now: time.Unix(1_800_000_000, 0)} }

func (c *testClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *testClock) AfterFunc(d time.Duration, f func()) func() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d <= commitWait { // the gathering of news is of no interest here
		go f()
		return func() bool { return false }
	}
	tm := &testTimer{c.now.Add(d), f}
	c.timers = append(c.timers, tm)
	c.wake()
	return func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		n := len(c.timers)
		c.timers = slices.DeleteFunc(c.timers, func(x *testTimer) bool { return x == tm })
		return len(c.timers) < n
	}
}

// advance moves the clock and runs what is due.
func (c *testClock) advance(d time.Duration) {
	c.mu.Lock()
	c.now = c.now.Add(d)
	var due []*testTimer
	c.timers = slices.DeleteFunc(c.timers, func(x *testTimer) bool {
		if x.at.After(c.now) {
			return false
		}
		due = append(due, x)
		return true
	})
	c.mu.Unlock()
	for _, tm := range due {
		go tm.f()
	}
}

// fakeKernel stands for maps and programs.
type fakeKernel struct {
	notice
	services   map[string]*nodepb.Service
	policies   map[string]*nodepb.Policies
	workloads  map[uint64]tables.Workload
	local      []netip.Addr
	commits    int
	prunes     int
	counts     int
	countErr   error
	sweeps     int
	marked     []tables.Endpoint
	next       tables.Change // of the next Commit
	nextErr    error
	refused    []uint64
	refuseAll  bool
	openErr    error
	breakglass bool
	root       string
	ids        map[string]uint64
}

func newFakeKernel(t *testing.T) *fakeKernel {
	return &fakeKernel{
		services: map[string]*nodepb.Service{}, policies: map[string]*nodepb.Policies{}, workloads: map[uint64]tables.Workload{},
		root: filepath.Join(t.TempDir(), "inlay"), ids: map[string]uint64{},
	}
}

// do changes the state under the lock.
func (k *fakeKernel) do(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
	k.wake()
}

// is looks at the state under the lock.
func (k *fakeKernel) is(ok func() bool) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return ok()
}

// workload is the one in a cgroup.
func (k *fakeKernel) workload(path string) tables.Workload {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.workloads[k.ids[path]]
}

func (k *fakeKernel) rooms() rooms {
	return rooms{
		resolve: func(string) (string, error) { return k.root, nil },
		cgroups: func(root string) (*cgroups, error) {
			return &cgroups{root: root, mount: filepath.Dir(root), proc: filepath.Join(filepath.Dir(root), "proc"), id: k.idOf, rmdir: func(path string) error {
				if err := os.Remove(filepath.Join(path, "cgroup.events")); err != nil {
					return err
				}
				return os.Remove(path)
			}}, nil
		},
		open: func(_ load.Config, fill func(*bpfobj.InlayMaps) error) (programs, error) {
			if k.openErr != nil {
				return nil, k.openErr
			}
			if err := os.MkdirAll(k.root, 0o755); err != nil {
				return nil, err
			}
			if err := fill(nil); err != nil {
				return nil, err
			}
			return fakePrograms{k}, nil
		},
		table:      func(*bpfobj.InlayMaps, tables.Config) (table, error) { return k, nil },
		metrics:    exporter,
		clock:      realClock{}, // its back-off is short, and moving it by hand would outrun real sockets
		localAddrs: func() (uint64, []netip.Addr, error) { return 7, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil },
	}
}

// idOf plays the kernel, which makes cgroup.events with each directory.
func (k *fakeKernel) idOf(path string) (uint64, error) {
	events := filepath.Join(path, "cgroup.events")
	if _, err := os.Stat(events); err != nil {
		if err := os.WriteFile(events, []byte("populated 0\nfrozen 0\n"), 0o644); err != nil {
			return 0, err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ids[path] == 0 {
		k.ids[path] = uint64(1000 + len(k.ids))
	}
	return k.ids[path], nil
}

func (k *fakeKernel) SetService(s *nodepb.Service) error {
	if s.GetName() == "invalid" {
		return errors.New("invalid")
	}
	k.do(func() { k.services[s.GetNamespace()+"/"+s.GetName()] = s })
	return nil
}
func (k *fakeKernel) DeleteService(name string) { k.do(func() { delete(k.services, name) }) }
func (k *fakeKernel) SetPolicies(p *nodepb.Policies) error {
	k.do(func() { k.policies[p.GetNamespace()+"/"+p.GetService()] = p })
	return nil
}
func (k *fakeKernel) DeletePolicies(name string) { k.do(func() { delete(k.policies, name) }) }
func (k *fakeKernel) SetWorkload(id uint64, w tables.Workload) {
	k.do(func() {
		k.workloads[id] = w
		if k.refuseAll {
			k.refused = append(k.refused, id)
		}
	})
}
func (k *fakeKernel) DeleteWorkload(id uint64)                               { k.do(func() { delete(k.workloads, id) }) }
func (k *fakeKernel) SetLocalAddrs(_ uint64, addrs []netip.Addr)             { k.do(func() { k.local = addrs }) }
func (k *fakeKernel) Identity(uint64) (tables.Identity, bool)                { return tables.Identity{}, false }
func (k *fakeKernel) Rule(uint32) (tables.Rule, bool)                        { return tables.Rule{}, false }
func (k *fakeKernel) ServiceAt(netip.AddrPort, uint8) (string, uint16, bool) { return "", 0, false }
func (k *fakeKernel) Prune() error                                           { k.do(func() { k.prunes++ }); return nil }
func (k *fakeKernel) ClearGone() error                                       { return nil }
func (k *fakeKernel) MarkGone(eps []tables.Endpoint) (int, error) {
	k.do(func() { k.marked = append(k.marked, eps...) })
	return len(eps), nil
}
func (k *fakeKernel) Usage() []tables.MapUsage {
	return []tables.MapUsage{{Name: "services", Entries: 1, Capacity: 2}}
}
func (k *fakeKernel) Count() error { k.do(func() { k.counts++ }); return k.countErr }
func (k *fakeKernel) Services() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.services)
}
func (k *fakeKernel) Commit() (c tables.Change, err error) {
	k.do(func() {
		k.commits++
		c, err = k.next, k.nextErr
		c.Refused = slices.Clone(k.refused)
		k.next = tables.Change{}
	})
	return c, err
}

type fakePrograms struct{ k *fakeKernel }

func (p fakePrograms) Cgroup() string                      { return p.k.root }
func (p fakePrograms) Pin() string                         { return "/pins" }
func (p fakePrograms) Maps() *bpfobj.InlayMaps             { return nil }
func (p fakePrograms) Hooks() []load.Hook                  { return nil }
func (p fakePrograms) Stats() ([]load.ProgramStats, error) { return nil, nil }
func (p fakePrograms) Sweep() error                        { p.k.do(func() { p.k.sweeps++ }); return nil }
func (p fakePrograms) Close() error                        { return nil }
func (p fakePrograms) Breakglass() (bool, error) {
	p.k.mu.Lock()
	defer p.k.mu.Unlock()
	return p.k.breakglass, nil
}

// fakeControlPlane is an incremental ADS server for the agent's types, on a unix socket. It answers
// a name that it does not have, as ours does.
type fakeControlPlane struct {
	notice
	t       *testing.T
	path    string
	holds   map[[2]string][]byte // by type and name
	version map[[2]string]int
	n       int
	agents  []string // user agents that connected
	asked   map[string]bool
	silent  bool // answers nothing
	server  *grpc.Server
}

func newFakeControlPlane(t *testing.T) *fakeControlPlane {
	return &fakeControlPlane{t: t, path: filepath.Join(t.TempDir(), "cp.sock"), holds: map[[2]string][]byte{}, version: map[[2]string]int{}, asked: map[string]bool{}}
}

func (c *fakeControlPlane) start() {
	l, err := net.Listen("unix", c.path)
	if err != nil {
		c.t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnknownServiceHandler(c.serve), grpc.WaitForHandlers(true))
	c.server = s
	go func() { _ = s.Serve(l) }()
}

func (c *fakeControlPlane) stop() { c.server.Stop() }

func (c *fakeControlPlane) set(messages ...proto.Message) {
	for _, m := range messages {
		b, err := proto.Marshal(m)
		if err != nil {
			c.t.Fatal(err)
		}
		k := [2]string{ServiceType}
		switch m := m.(type) {
		case *nodepb.Service:
			k[1] = m.GetNamespace() + "/" + m.GetName()
		case *nodepb.Policies:
			k = [2]string{PoliciesType, m.GetNamespace() + "/" + m.GetService()}
		}
		c.mu.Lock()
		c.n++
		c.holds[k], c.version[k] = b, c.n
		c.wake()
		c.mu.Unlock()
	}
}

func (c *fakeControlPlane) remove(typeURL, name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.holds, [2]string{typeURL, name})
	c.wake()
}

func (c *fakeControlPlane) serve(_ any, s grpc.ServerStream) error {
	requests, failed := make(chan *xdspb.DeltaDiscoveryRequest), make(chan error, 1)
	go func() {
		for {
			m := &xdspb.DeltaDiscoveryRequest{}
			if err := s.RecvMsg(m); err != nil {
				failed <- err
				return
			}
			select {
			case requests <- m:
			case <-s.Context().Done():
				failed <- s.Context().Err()
				return
			}
		}
	}()
	sent := map[[2]string]int{} // version at the client; 0 nothing yet, -1 told that there is none
	all, due := map[string]bool{}, map[string]bool{}
	nonce := 0
	for {
		c.mu.Lock()
		out := map[string]*xdspb.DeltaDiscoveryResponse{}
		response := func(typeURL string) *xdspb.DeltaDiscoveryResponse {
			if out[typeURL] == nil {
				nonce++
				out[typeURL] = &xdspb.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: fmt.Sprint(nonce)}
			}
			return out[typeURL]
		}
		if !c.silent {
			for typeURL := range due {
				response(typeURL)
				delete(due, typeURL)
			}
			for k := range c.holds {
				if _, ok := sent[k]; all[k[0]] && !ok {
					sent[k] = 0
				}
			}
			for k, at := range sent {
				b, ok := c.holds[k]
				switch {
				case ok && at != c.version[k]:
					r := response(k[0])
					r.Resources = append(r.Resources, &xdspb.Resource{Name: k[1], Version: fmt.Sprint(c.version[k]), Resource: &anypb.Any{TypeUrl: k[0], Value: b}})
					sent[k] = c.version[k]
				case !ok && at != -1:
					r := response(k[0])
					r.RemovedResources = append(r.RemovedResources, k[1])
					sent[k] = -1
				}
			}
		}
		if c.changed == nil {
			c.changed = make(chan struct{})
		}
		changed := c.changed
		c.mu.Unlock()
		for _, r := range out {
			if err := s.SendMsg(r); err != nil {
				return err
			}
		}
		select {
		case m := <-requests:
			c.mu.Lock()
			if n := m.GetNode(); n != nil {
				c.agents = append(c.agents, n.GetUserAgentName())
			}
			for _, n := range m.GetResourceNamesSubscribe() {
				c.asked[n] = true
				if n == "*" {
					all[m.GetTypeUrl()], due[m.GetTypeUrl()] = true, true
				} else {
					sent[[2]string{m.GetTypeUrl(), n}] = 0
				}
			}
			for n, v := range m.GetInitialResourceVersions() {
				at := 0
				fmt.Sscan(v, &at)
				sent[[2]string{m.GetTypeUrl(), n}] = at
			}
			for _, n := range m.GetResourceNamesUnsubscribe() {
				delete(sent, [2]string{m.GetTypeUrl(), n})
			}
			c.wake()
			c.mu.Unlock()
		case <-changed:
		case err := <-failed:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// lines is a log that tests wait on.
type lines struct {
	notice
	text []string
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, string(b))
	l.wake()
	return len(b), nil
}

func (l *lines) has(parts ...string) func() bool {
	return func() bool {
		return slices.ContainsFunc(l.text, func(line string) bool {
			for _, p := range parts {
				if !strings.Contains(line, p) {
					return false
				}
			}
			return true
		})
	}
}

// running is an agent under test.
type running struct {
	*Agent
	log  *lines
	stop func() // ends it and waits; may be called twice
}

// run starts an agent and waits until it is ready.
func run(t *testing.T, cfg Config, r rooms) running {
	t.Helper()
	out := running{log: &lines{}}
	cfg.Log = slog.New(slog.NewTextHandler(out.log, &slog.HandlerOptions{Level: slog.LevelInfo}))
	if cfg.Metrics == "" {
		cfg.Metrics = "off"
	}
	var err error
	if out.Agent, err = newAgent(cfg, r); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- out.Run(ctx) }()
	var once sync.Once
	out.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("Run: %v", err)
				}
			case <-time.After(patience):
				t.Error("Run did not end")
			}
		})
	}
	t.Cleanup(out.stop)
	select {
	case <-out.Ready():
	case err := <-done:
		done <- nil
		t.Fatalf("Run ended: %v", err)
	case <-time.After(patience):
		t.Fatal("not ready")
	}
	return out
}

// config of an agent with directories of its own.
func testConfig(t *testing.T, cp *fakeControlPlane, clock Clock) Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "inlay") // t.TempDir() may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return Config{RunDir: dir, StateDir: filepath.Join(dir, "state"), ControlPlane: cp.path, Clock: clock, Version: "test"}
}

func service(name string) *nodepb.Service {
	return &nodepb.Service{Namespace: "default", Name: name}
}

func policies(name string) *nodepb.Policies {
	return &nodepb.Policies{Namespace: "default", Service: name}
}

// now says whether ok holds at this moment.
func (l *lines) now(ok func() bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return ok()
}
