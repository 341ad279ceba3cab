package controlplane

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/fx"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/inlay-mesh/inlay/controlplane/source"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

func TestAChangeOfAFileReachesTheClient(t *testing.T) {
	p := launch(t, func(c *Config) {
		if err := os.WriteFile(filepath.Join(c.ConfigDir, "mesh.yaml"), []byte(permissive), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	p.ready()
	x := follow(t, p.plaintext(), endpoints, "orders.default:8080")
	if got := x.addresses(); got != "127.0.0.1:9001" {
		t.Fatalf("endpoints = %q", got)
	}
	first := p.until("an acknowledgement", func(r *adminpb.Revision) bool { return r.GetAcked() == 1 && r.GetSubscribed() == 1 })
	if first.GetObjects() != 1 || len(first.GetFaults()) != 0 {
		t.Errorf("revision = %v", first)
	}

	p.write("mesh.yaml", strings.Replace(permissive, "9001", "9002", 1))
	if got := x.addresses(); got != "127.0.0.1:9002" {
		t.Errorf("after the change: %q", got)
	}
	second := p.until("the new revision", func(r *adminpb.Revision) bool { return r.GetId() != first.GetId() && r.GetAcked() == 1 })

	p.write("broken.yaml", "kind: MeshService\nmetadata: [\n")
	p.write("worse.yaml", strings.Replace(permissive, "mtls: permissive", "mtls: sometimes", 1))
	refused := p.until("the faults", func(r *adminpb.Revision) bool { return len(r.GetFaults()) >= 2 })
	if refused.GetId() != second.GetId() || refused.GetAcked() != 1 {
		t.Errorf("refused files changed the running revision: %v", refused)
	}
	for _, f := range refused.GetFaults() {
		if !strings.HasPrefix(f.GetCode(), "INL1") || !strings.Contains(f.GetSource(), ".yaml:") || f.GetMessage() == "" {
			t.Errorf("fault = %v", f)
		}
	}

	if err := os.Remove(filepath.Join(p.cfg.ConfigDir, "broken.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(p.cfg.ConfigDir, "worse.yaml")); err != nil {
		t.Fatal(err)
	}
	p.until("the end of the faults", func(r *adminpb.Revision) bool { return len(r.GetFaults()) == 0 && r.GetId() == second.GetId() })
	p.write("mesh.yaml", "")
	if got := x.addresses(); got != "gone" {
		t.Errorf("after the removal: %q", got)
	}
}

func TestRestartKeepsInstancesAndTheLastGoodRevision(t *testing.T) {
	p := launch(t, nil)
	p.write("mesh.yaml", permissive)
	p.until("the service", func(r *adminpb.Revision) bool { return r.GetObjects() == 1 })
	enrol(t, p.mtls("orders"), sdkInstance("i-1", "orders", "10.0.0.1:7000"))
	before := p.until("the revision", func(r *adminpb.Revision) bool { return r.GetId() != "" })
	root := p.CA().Root()
	p.stopOne(p.ControlPlane)

	p.write("mesh.yaml", "kind: [")
	p.start()
	p.ready()
	if !p.CA().Root().Equal(root) {
		t.Error("the authority has another root")
	}
	// The first word has both: no moment without a revision, none without faults.
	rev := p.until("the first word", func(r *adminpb.Revision) bool { return len(r.GetFaults()) > 0 || r.GetId() != "" })
	if len(rev.GetFaults()) == 0 || rev.GetId() != before.GetId() || !rev.GetTime().AsTime().Equal(before.GetTime().AsTime()) {
		t.Errorf("revision %v, want %v of before", rev, before)
	}
	x := follow(t, p.plaintext(), endpoints, "orders.default:8080")
	if got := x.addresses(); got != "127.0.0.1:9001 10.0.0.1:7000" && got != "10.0.0.1:7000 127.0.0.1:9001" {
		t.Errorf("endpoints after the restart = %q", got)
	}
	eps, err := p.admin().ListEndpoints(t.Context(), connect.NewRequest(&adminpb.ListEndpointsRequest{Service: "orders"}))
	if err != nil || len(eps.Msg.GetEndpoints()) != 2 {
		t.Errorf("ListEndpoints = %v, %v", eps, err)
	}
}

func TestRestartWithAnUnreadableDirectory(t *testing.T) {
	p := launch(t, nil)
	p.write("mesh.yaml", permissive)
	before := p.until("the service", func(r *adminpb.Revision) bool { return r.GetObjects() == 1 })
	p.stopOne(p.ControlPlane)
	if err := os.Truncate(filepath.Join(p.cfg.ConfigDir, "mesh.yaml"), 1<<30); err != nil { // beyond every bound
		t.Fatal(err)
	}
	p.start()
	p.ready()
	rev := p.until("the reason", func(r *adminpb.Revision) bool {
		return len(r.GetWarnings()) == 1 && r.GetWarnings()[0].GetCode() == "SOURCE"
	})
	if rev.GetId() != before.GetId() || rev.GetObjects() != 1 {
		t.Errorf("revision = %v, want that of before", rev)
	}
}

func TestNothingIsServedInPlaceOfRefusedFiles(t *testing.T) {
	p := launch(t, func(c *Config) {
		if err := os.WriteFile(filepath.Join(c.ConfigDir, "mesh.yaml"), []byte("kind: Nonsense\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	p.until("the faults", func(r *adminpb.Revision) bool { return len(r.GetFaults()) > 0 && r.GetId() == "" })
	resp, err := http.Get("http://" + p.Addresses()[AddressAdmin] + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("readyz = %d", resp.StatusCode)
	}
	select {
	case <-p.Ready():
		t.Error("ready with nothing but faults")
	default:
	}
	p.write("mesh.yaml", permissive)
	p.ready()
}

func TestAnInstanceComesAndLeaves(t *testing.T) {
	p := launch(t, nil)
	p.ready()
	orders := p.mtls("orders")
	s := enrol(t, orders, sdkInstance("i-1", "orders", "10.0.0.1:7000"))
	x := follow(t, p.mtls("cart"), endpoints, "orders.default:8080", "inlay.sdk")
	x.untilAddresses("10.0.0.1:7000")
	if err := s.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Drain{Drain: &registrypb.Drain{}}}); err != nil {
		t.Fatal(err)
	}
	x.untilAddresses("") // and acknowledges, which ends the wait
	resp, err := s.Recv()
	if err != nil || !resp.GetDrained().GetAll() {
		t.Errorf("drained = %v, %v", resp, err)
	}
	x.untilAddresses("gone") // nobody declared the service: it went with its last instance

	certs, err := p.admin().ListCerts(t.Context(), connect.NewRequest(&adminpb.ListCertsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range certs.Msg.GetCerts() {
		names = append(names, c.GetSpiffeId())
	}
	for _, want := range []string{"spiffe://inlay.local/ns/default/svc/orders", "spiffe://inlay.local/ns/inlay/svc/controlplane"} {
		if !strings.Contains(strings.Join(names, " "), want) {
			t.Errorf("certs = %v, want %s", names, want)
		}
	}
}

func TestThePlaintextPortHasConfigurationOnly(t *testing.T) {
	p := launch(t, nil)
	p.ready()
	s, err := registrypb.NewRegistryClient(p.plaintext()).Register(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Unimplemented {
		t.Errorf("register over plaintext: %v", err)
	}
}

func TestMutualTLSWantsAnIdentity(t *testing.T) {
	p := launch(t, nil)
	p.ready()
	conn, err := net.Dial("tcp", p.Addresses()[AddressXDSMTLS])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	for err == nil {
		_, err = conn.Read(make([]byte, 100))
	}
	p.logs.until(t, "connection refused")
}

func TestApply(t *testing.T) {
	p := launch(t, func(c *Config) { c.ConfigDir, c.DataDir, c.RunDir = "", "", "" })
	p.ready()
	got, err := p.Apply(t.Context(), []source.File{{Path: "mesh.yaml", Data: []byte(permissive)}})
	if err != nil || got.Revision == "" {
		t.Fatalf("Apply = %+v, %v", got, err)
	}
	x := follow(t, p.plaintext(), endpoints, "orders.default:8080")
	if got := x.addresses(); got != "127.0.0.1:9001" {
		t.Errorf("endpoints = %q", got)
	}
	_, err = p.Apply(t.Context(), []source.File{{Path: "mesh.yaml", Data: []byte("kind: Nonsense\n")}})
	var refused *RefusedError
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), "mesh.yaml:1:") {
		t.Errorf("Apply of nonsense: %v", err)
	}
	if rev := p.until("the faults", func(r *adminpb.Revision) bool { return len(r.GetFaults()) > 0 }); rev.GetId() != got.Revision {
		t.Errorf("running = %s, want %s", rev.GetId(), got.Revision)
	}
}

func TestSnapshotIsWhatTheServiceMayAskFor(t *testing.T) {
	p := launch(t, func(c *Config) {
		c.EncodeSnapshot = func(s Snapshot) ([]byte, error) {
			var names []string
			for _, r := range s.Resources {
				names = append(names, r.Name)
			}
			return []byte(s.SPIFFEID + " " + strings.Join(s.Namespaces, ",") + " " + strings.Join(names, " ")), nil
		}
	})
	p.write("mesh.yaml", permissive)
	rev := p.until("the service", func(r *adminpb.Revision) bool { return r.GetObjects() == 1 })
	got, err := p.admin().GetSnapshot(t.Context(), connect.NewRequest(&adminpb.GetSnapshotRequest{Service: "cart"}))
	if err != nil || got.Msg.GetRevision() != rev.GetId() {
		t.Fatalf("snapshot = %v, %v", got, err)
	}
	for _, want := range []string{"spiffe://inlay.local/ns/default/svc/cart default ", "orders.default:8080"} {
		if !strings.Contains(string(got.Msg.GetSnapshot()), want) {
			t.Errorf("snapshot = %s, want %q", got.Msg.GetSnapshot(), want)
		}
	}
}

func TestAFullDiskStopsNobody(t *testing.T) {
	p := launch(t, nil)
	p.ready()
	if err := p.disk.store.Close(); err != nil { // every write fails from here
		t.Fatal(err)
	}
	p.write("mesh.yaml", permissive)
	rev := p.until("the warning", func(r *adminpb.Revision) bool {
		for _, w := range r.GetWarnings() {
			if w.GetCode() == "STORE" && strings.Contains(w.GetMessage(), "not remembered over a restart") {
				return r.GetObjects() == 1
			}
		}
		return false
	})
	if rev.GetId() == "" {
		t.Error("the revision is not served")
	}
	enrol(t, p.mtls("orders"), sdkInstance("i-1", "orders", "10.0.0.1:7000"))
}

func TestRefusesToStart(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	used := t.TempDir()
	launch(t, func(c *Config) { c.DataDir = used })
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	pid := strconv.Itoa(os.Getpid())
	for name, tc := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"plaintext on every address":     {func(c *Config) { c.Plaintext = "0.0.0.0:15010" }, "--xds-addr 0.0.0.0:15010: want a loopback address"},
		"plaintext on no host":           {func(c *Config) { c.Plaintext = ":15010" }, "that is every address of this machine"},
		"plaintext on a name":            {func(c *Config) { c.Plaintext = "example.com:15010" }, "want a loopback address"},
		"admin on every IPv6 address":    {func(c *Config) { c.Admin = "[::]:15080" }, "--admin-addr [::]:15080: want a loopback address"},
		"mTLS without a port":            {func(c *Config) { c.MTLS = "127.0.0.1" }, "--xds-mtls-addr"},
		"a trust domain with a slash":    {func(c *Config) { c.TrustDomain = "a/b" }, "--trust-domain"},
		"a taken port":                   {func(c *Config) { c.MTLS = taken.Addr().String() }, "address in use by pid " + pid + " (controlplane.te); stop it or pass --xds-mtls-addr"},
		"a data directory in use":        {func(c *Config) { c.DataDir = used }, "is in use by pid " + pid},
		"a data directory that is none":  {func(c *Config) { c.DataDir = file }, "--data DIR"},
		"no configuration directory":     {func(c *Config) { c.ConfigDir = filepath.Join(used, "none") }, "create it"},
		"a run directory that is a file": {func(c *Config) { c.RunDir = file }, "--run-dir"},
		"a socket in place of a file":    {func(c *Config) { c.UnixSocket = file }, "no socket is in the way"},
		"a socket with a long path":      {func(c *Config) { c.UnixSocket = "/tmp/" + strings.Repeat("x", 200) }, "want at most 107"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Config{ConfigDir: t.TempDir(), DataDir: t.TempDir()}
			tc.change(&cfg)
			cp, err := New(cfg)
			if err == nil {
				err = cp.Start(t.Context())
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("err = %v, want %q", err, tc.want)
			}
			if cfg.DataDir != used && cfg.DataDir != file { // nothing is left open
				cfg = Config{DataDir: cfg.DataDir}
				again, err := New(cfg)
				if err != nil {
					t.Fatalf("after the refusal: %v", err)
				}
				if err := again.Stop(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestStateFileTellsWhereItIs(t *testing.T) {
	p := launch(t, nil)
	s, err := ReadStateFile(p.cfg.RunDir)
	if err != nil || s.PID != os.Getpid() || s.Addresses[AddressXDSMTLS] != p.Addresses()[AddressXDSMTLS] || s.Addresses[AddressAdmin] == "" {
		t.Errorf("state = %+v, %v", s, err)
	}
	p.stopOne(p.ControlPlane)
	if _, err := ReadStateFile(p.cfg.RunDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the stop: %v", err)
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	run := t.TempDir()
	l := &logs{}
	ended := make(chan error, 1)
	go func() {
		ended <- Run(ctx, Config{RunDir: run, Admin: "127.0.0.1:0", MTLS: "127.0.0.1:0", Log: slog.New(slog.NewTextHandler(l, nil))})
	}()
	l.until(t, "control plane started")
	if _, err := ReadStateFile(run); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run = %v", err)
	}
	if _, err := ReadStateFile(run); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the end: %v", err)
	}
}

func TestModuleIsPartOfAnApplication(t *testing.T) {
	var cp *ControlPlane
	app := fx.New(Module(Config{Plaintext: "127.0.0.1:0"}), fx.Populate(&cp), quiet(nil))
	if err := app.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-cp.Ready()
	// A part that ends by itself ends the application.
	end := app.Wait()
	cp.servers.fail(errors.New("broken"))
	if got := <-end; got.ExitCode != 1 {
		t.Errorf("signal = %v, want exit code 1", got)
	}
	if err := app.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	if cp.Err() == nil {
		t.Error("Err() = nil")
	}
}
