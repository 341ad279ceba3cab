package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	stockxds "google.golang.org/grpc/xds" // the stock client too: resolver xds:/// and its balancers

	"github.com/inlay-mesh/inlay/examples/hellopb"
)

// stockMesh is a permissive service in two versions, split 80/20, and a strict one.
func stockMesh() map[string]string {
	return map[string]string{"mesh.yaml": fmt.Sprintf(service, "greeter", "GRPC", "permissive") + versions + `---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: split}
spec:
  parentRefs: [{kind: Service, group: "", name: greeter}]
  rules:
  - matches: [{headers: [{name: x-canary, value: "yes"}]}]
    backendRefs: [{group: inlay.dev, kind: ServiceVersion, name: greeter.v2}]
  - backendRefs:
    - {group: inlay.dev, kind: ServiceVersion, name: greeter.v1, weight: 80}
    - {group: inlay.dev, kind: ServiceVersion, name: greeter.v2, weight: 20}
---
` + fmt.Sprintf(service, "closed", "GRPC", "strict")}
}

// bootstrap writes the gRPC bootstrap of a service and returns its path.
func (m *mesh) bootstrap(name string, flags ...string) string {
	m.t.Helper()
	file := filepath.Join(m.dir, name+"-bootstrap.json")
	if _, stderr, code := m.cli(append([]string{"bootstrap", "--service", name, "--run-dir", m.run, "-o", file}, flags...)...); code != 0 {
		m.t.Fatalf("inlay bootstrap: exit code %d: %s", code, stderr)
	}
	return file
}

// stock starts a program that is not below `inlay run`: it has no identity, only the bootstrap.
func (m *mesh) stock(role string, env ...string) *proc {
	m.t.Helper()
	self, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	return startProc(m.t, role, exec.Command(self), append(env, "E2E_ROLE="+role, "GRPC_XDS_BOOTSTRAP="+m.bootstrap("shop")))
}

// TestStockGRPC: grpc-go's own xds:/// client calls a permissive service by plain xDS, and is told
// why it does not get a strict one.
func TestStockGRPC(t *testing.T) {
	t.Parallel() // these four mostly wait
	m := newMesh(t, stockMesh())
	v1, v2 := m.program("greeter", "v1", "grpc-server"), m.program("greeter", "v2", "grpc-server")
	m.endpoints("greeter", 2)
	c := m.stock("stock-caller", "E2E_TARGET=xds:///greeter", "E2E_COUNT=50")
	e := c.event("calls")
	c.wait()
	if e.Calls != 50 || e.Failed != 0 {
		t.Errorf("%d of %d calls failed: %q", e.Failed, e.Calls, c.errors())
	}
	strict := m.stock("stock-caller", "E2E_TARGET=xds:///closed", "E2E_COUNT=1", "E2E_LINGER=1")
	strict.event("calls")
	var clients struct {
		Clients []struct {
			Kind      string
			Resources []struct{ Name, Withheld string }
		}
	}
	m.eventually("the reason why the strict service is withheld", func() bool {
		clients.Clients = nil
		m.jsonOf(&clients, "get", "clients", "--resources")
		for _, cl := range clients.Clients {
			for _, r := range cl.Resources {
				if cl.Kind == "grpc" && r.Name == "closed" && strings.Contains(r.Withheld, "mutual TLS") {
					return true
				}
			}
		}
		return false
	})
	strict.stop()
	v1.stop()
	v2.stop()
	for _, s := range []*proc{v1, v2} {
		for peer := range s.event("handled").Peers {
			if peer != "nobody" {
				t.Errorf("a plaintext caller has identity %s", peer)
			}
		}
	}
}

// TestStockPython: Python's grpcio does the same.
func TestStockPython(t *testing.T) {
	python := os.Getenv("INLAY_PYTHON")
	if python == "" {
		skip(t, "INLAY_PYTHON is not set: run through make test, which installs grpcio and sets it")
	}
	m := newMesh(t, stockMesh())
	v1, v2 := m.program("greeter", "v1", "grpc-server"), m.program("greeter", "v2", "grpc-server")
	m.endpoints("greeter", 2)
	c := startProc(t, "python", exec.Command(python, filepath.Join("testdata", "client.py"), "xds:///greeter", "50"),
		[]string{"GRPC_XDS_BOOTSTRAP=" + m.bootstrap("shop")})
	c.wait()
	if c.err != nil {
		t.Fatalf("client.py: %v", c.err)
	}
	v1.stop()
	v2.stop()
	if n := v1.event("handled").Handled + v2.event("handled").Handled; n != 50 {
		t.Errorf("servers handled %d calls, want 50", n)
	}
}

// TestSameEndpoints: the stock client and ours reach the same endpoints: exactly where a header
// decides, by distribution where a weight does.
func TestSameEndpoints(t *testing.T) {
	const n = 1500
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	m := newMesh(t, stockMesh())
	m.program("greeter", "v1", "grpc-server")
	m.program("greeter", "v2", "grpc-server")
	m.endpoints("greeter", 2)
	env := []string{"E2E_COUNT=" + strconv.Itoa(n), "E2E_SEED=" + strconv.FormatUint(seed, 10)}
	stock := m.stock("stock-caller", append(env, "E2E_TARGET=xds:///greeter")...).event("calls")
	ours := m.program("web", "", "counted", append(env, "E2E_CALL=grpc:greeter")...).event("calls")
	if stock.Failed+ours.Failed != 0 {
		t.Fatalf("failed: stock %d, ours %d", stock.Failed, ours.Failed)
	}
	if s, o := stock.Peers["canary greeter-v2"], ours.Peers["canary greeter-v2"]; s != o || s == 0 {
		t.Errorf("calls with the header at v2: stock %d, ours %d, want the same and more than 0", s, o)
	}
	if s, o := stock.Peers["canary greeter-v1"], ours.Peers["canary greeter-v1"]; s+o != 0 {
		t.Errorf("calls with the header at v1: stock %d, ours %d, want none", s, o)
	}
	plain := float64(n) - float64(ours.Peers["canary greeter-v2"])
	limit := 5 * math.Sqrt(plain*0.8*0.2) // five standard deviations of the binomial split
	for name, e := range map[string]event{"stock": stock, "ours": ours} {
		if got := float64(e.Peers["plain greeter-v1"]); math.Abs(got-0.8*plain) > limit {
			t.Errorf("%s: %v of %v calls at v1, want 80 %% within %.0f", name, got, plain, limit)
		}
	}
}

// TestGoSPIFFE: go-spiffe's own client gets the identity of the service it runs below, and nothing
// outside a registration.
func TestGoSPIFFE(t *testing.T) {
	m := newMesh(t, nil)
	if got, want := m.program("shop", "", "go-spiffe").event("ready").Text, "spiffe://inlay.local/ns/default/svc/shop"; got != want {
		t.Errorf("identity %s, want %s", got, want)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	outside := startProc(t, "outside", exec.Command(self), []string{"E2E_ROLE=go-spiffe", "SPIFFE_ENDPOINT_SOCKET=unix://" + filepath.Join(m.run, "workload.sock")})
	if e := outside.event("error"); !strings.Contains(e.Text, "PermissionDenied") || !strings.Contains(e.Text, "inlay run") {
		t.Errorf("outside: %s", e.Text)
	}
}

// TestGoSPIFFEWatch: go-spiffe's watch, which asks once and is told ever after, sees SVIDs of 6 s
// replaced at half of their life: other serials, the same identity, each valid when it comes.
func TestGoSPIFFEWatch(t *testing.T) {
	t.Parallel() // these four mostly wait
	m := newMesh(t, nil, "--svid-ttl", "6s")
	p := m.program("shop", "", "go-spiffe-watch")
	p.await("three serials", func(lines []string) bool { return len(serials(lines)) >= 3 })
	p.stop()
	if errs := p.errors(); len(errs) > 0 {
		t.Errorf("the watch saw errors: %q", errs)
	}
}

// serials are the different ones of the SVIDs that a program said it was given.
func serials(lines []string) map[string]bool {
	out := map[string]bool{}
	for _, l := range lines {
		var e event
		if json.Unmarshal([]byte(l), &e) == nil && e.Kind == "svid" {
			out[e.Text] = true
		}
	}
	return out
}

// svidWatcher says what go-spiffe's watch tells it.
type svidWatcher struct{}

func (svidWatcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	svid := c.DefaultSVID()
	leaf := svid.Certificates[0]
	_, _, err := x509svid.Verify(svid.Certificates, c.Bundles)
	switch want := "spiffe://inlay.local/ns/default/svc/shop"; {
	case err != nil:
		say(event{Kind: "error", Text: fmt.Sprintf("serial %v: %v", leaf.SerialNumber, err)})
	case svid.ID.String() != want:
		say(event{Kind: "error", Text: fmt.Sprintf("serial %v: identity %s, want %s", leaf.SerialNumber, svid.ID, want)})
	default:
		say(event{Kind: "svid", Text: leaf.SerialNumber.String()})
	}
}

func (svidWatcher) OnX509ContextWatchError(err error) {
	if status.Code(err) != codes.Canceled { // the end of the program
		say(event{Kind: "error", Text: err.Error()})
	}
}

// TestStockServer: a stock gRPC server gets no listener on the plaintext port, where nobody shows
// who they are: it accepts no call and says so, and `inlay get clients` says why. Below `inlay run`
// and by the unix socket, where the kernel says whose it is, it serves a permissive service.
func TestStockServer(t *testing.T) {
	t.Parallel() // these four mostly wait
	m := newMesh(t, stockMesh())
	nobody := m.stock("stock-server")
	somebody := m.program("greeter", "v1", "stock-server", "GRPC_XDS_BOOTSTRAP="+m.bootstrap("greeter", "--server", "unix:"+filepath.Join(m.run, "controlplane.sock")))
	if e := somebody.event("mode"); !strings.HasPrefix(e.Text, "SERVING") {
		t.Errorf("with an identity: mode %q, want SERVING", e.Text)
	}
	e := nobody.event("mode")
	if !strings.HasPrefix(e.Text, "NOT_SERVING") {
		t.Errorf("without an identity: mode %q, want NOT_SERVING", e.Text)
	}
	t.Logf("without an identity: %s", e.Text)
	var clients struct {
		Clients []struct {
			Identity  string
			Resources []struct{ Name, Withheld string }
		}
	}
	m.jsonOf(&clients, "get", "clients", "--resources")
	told := ""
	for _, cl := range clients.Clients {
		for _, r := range cl.Resources {
			if strings.HasPrefix(r.Name, "grpc/server?") && cl.Identity == "" {
				told = r.Withheld
			}
		}
	}
	if !strings.Contains(told, "identity") {
		t.Errorf("inlay get clients says %q, want why the server's listener is withheld", told)
	}
}

// foreignRole plays the roles of programs that do not use the SDK.
func foreignRole(ctx context.Context, role string) (bool, error) {
	switch role {
	case "go-spiffe":
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		svid, err := workloadapi.FetchX509SVID(ctx)
		if err != nil {
			return true, err
		}
		say(event{Kind: "ready", Text: svid.ID.String()})
		return true, nil
	case "go-spiffe-watch":
		err := workloadapi.WatchX509Context(ctx, svidWatcher{})
		if ctx.Err() != nil {
			return true, nil
		}
		return true, err
	case "stock-server":
		return true, stockServer(ctx)
	case "stock-caller":
		conn, err := grpc.NewClient(os.Getenv("E2E_TARGET"), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return true, err
		}
		err = counted(ctx, conn)
		if os.Getenv("E2E_LINGER") != "" {
			<-ctx.Done()
		}
		return true, errors.Join(err, conn.Close())
	}
	return false, nil
}

// stockServer serves by plain xDS, and says which mode it is in once that is decided.
func stockServer(ctx context.Context) error {
	s, err := stockxds.NewGRPCServer(stockxds.ServingModeCallback(func(_ net.Addr, a stockxds.ServingModeChangeArgs) {
		say(event{Kind: "mode", Text: fmt.Sprint(a.Mode, " ", a.Err)})
	}))
	if err != nil {
		return err
	}
	hellopb.RegisterGreeterServer(s, greeter{count: func(context.Context) {}, name: "stock"})
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(lis) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		s.Stop()
		return <-done
	}
}

// counted makes E2E_COUNT calls, some of them with the canary header as E2E_SEED draws it, and
// says who answered what.
func counted(ctx context.Context, conn grpc.ClientConnInterface) error {
	count, err := strconv.Atoi(os.Getenv("E2E_COUNT"))
	if err != nil {
		return err
	}
	var seed uint64
	if s := os.Getenv("E2E_SEED"); s != "" {
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			return err
		}
	}
	draw := rand.New(rand.NewPCG(seed, 0))
	e := event{Kind: "calls", Peers: map[string]int64{}}
	c := hellopb.NewGreeterClient(conn)
	for range count {
		kind, callCtx := "plain", ctx
		if draw.IntN(5) == 0 {
			kind, callCtx = "canary", metadata.AppendToOutgoingContext(ctx, "x-canary", "yes")
		}
		callCtx, cancel := context.WithTimeout(callCtx, 20*time.Second)
		r, err := c.Hello(callCtx, &hellopb.HelloRequest{Name: "stock"})
		cancel()
		e.Calls++
		if err != nil {
			e.Failed++
			say(event{Kind: "error", Text: err.Error()})
			continue
		}
		e.Peers[kind+" "+r.Text]++
	}
	say(e)
	return nil
}
