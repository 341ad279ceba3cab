package continuity

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// The mesh of most tests. guarded serves whoever bears the role client; strangers are refused by its own
// ingress policy, and by their egress policy where they call forbidden.
const worldFile = `apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: guarded}
spec: {ports: [{port: 80, protocol: TCP}]}
---
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: forbidden}
spec: {ports: [{port: 80, protocol: TCP}]}
---
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: echo}
spec: {ports: [{port: 90, protocol: UDP}]}
---
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: guard}
spec:
  workloads: {service: guarded}
  ingress:
  - name: clients-only
    from: [{labels: {role: client}}]
---
apiVersion: inlay.dev/v1alpha1
kind: NetworkPolicy
metadata: {name: keep-out}
spec:
  workloads: {labels: {role: stranger}}
  egress:
  - name: not-to-forbidden
    action: deny
    to: [{service: forbidden}]
`

// world is a mesh with its programs.
type world struct {
	*mesh
	resolver                 *resolver
	guarded, echo, forbidden *proc
	guardedAt, forbiddenAt   string // by virtual address
	echoAt                   string
	guardedReal              []string // by the addresses of its listener
	guarded6, forbidden6     string   // by virtual address of IPv6, which leads to the endpoint of IPv4
	echo6                    string
	client, stranger         *proc // nil until they are started
}

func newWorld(t *testing.T, nodeFlags ...string) *world {
	t.Helper()
	w := &world{mesh: newMesh(t, map[string]string{"world.yaml": worldFile}, nodeFlags...)}
	w.resolver = w.mesh.resolver()
	port := func(i int64) string { return fmt.Sprint(7000 + 10*w.number + i) }
	w.guardedReal = []string{"127.0.0.1:" + port(1), "[::1]:" + port(1)}
	w.guarded = w.program("guarded", "server", serverSettings{TCP: "[::]:" + port(1)}, "--port", "80:"+port(1))
	w.forbidden = w.program("forbidden", "server", serverSettings{TCP: "127.0.0.1:" + port(2)}, "--port", "80:"+port(2))
	w.echo = w.program("echo", "server", serverSettings{UDP: "127.0.0.1:" + port(3)}, "--port", "90:"+port(3)+"/udp")
	for service, at := range map[string]struct {
		four, six *string
		port      uint16
	}{
		"guarded":   {&w.guardedAt, &w.guarded6, 80},
		"forbidden": {&w.forbiddenAt, &w.forbidden6, 80},
		"echo":      {&w.echoAt, &w.echo6, 90},
	} {
		four, six := w.addressesOf(service, 1)
		*at.four, *at.six = netip.AddrPortFrom(four, at.port).String(), netip.AddrPortFrom(six, at.port).String()
	}
	return w
}

// ways are the addresses that guarded is called by: virtual and real ones of both families.
func (w *world) ways() []string {
	return append([]string{w.guardedAt, w.guarded6}, w.guardedReal...)
}

// clientProbes are calls that must all go well; perSecond is the rate of connections.
func (w *world) clientProbes(perSecond int) []probe {
	vip := strings.TrimSuffix(w.guardedAt, ":80")
	return []probe{
		{Name: "allowed", Kind: "tcp", Target: w.ways(), Word: "client", Rate: perSecond},
		{Name: "udp", Kind: "udp", Target: []string{w.echoAt}, Word: "unconnected", Rate: 50},
		{Name: "udp-connected", Kind: "connected", Target: []string{w.echoAt, w.echo6}, Word: "connected", Rate: 50},
		{Name: "mesh-name", Kind: "dns-udp", Target: []string{w.resolver.addr}, Question: "guarded.default.mesh", Want: vip, Rate: 50},
		{Name: "mesh-name-tcp", Kind: "dns-tcp", Target: []string{w.resolver.addr}, Question: "guarded.default", Want: vip, Rate: 25},
		{Name: "other-name", Kind: "dns-udp", Target: []string{w.resolver.addr}, Question: outsideName, Want: outsideAddr, Rate: 25},
		{Name: "flow", Kind: "flow", Target: []string{w.guardedAt}, Rate: 50},
	}
}

// strangerProbes are calls of which none may go well.
func (w *world) strangerProbes(perSecond int) []probe {
	return []probe{
		{Name: "ingress", Kind: "tcp", Target: w.ways(), Word: "stranger", Rate: perSecond, Refused: true},
		{Name: "egress", Kind: "tcp", Target: []string{w.forbiddenAt, w.forbidden6}, Word: "stranger", Rate: perSecond, Refused: true},
	}
}

func (w *world) startClient(probes []probe) {
	w.t.Helper()
	w.client = w.program("client", "prober", probes, "--label", "role=client")
}

func (w *world) startStranger(probes []probe) {
	w.t.Helper()
	w.stranger = w.program("stranger", "prober", probes, "--label", "role=stranger")
}

// startProbes starts both, and waits until the node decides about each of them as the policies say, which
// is from their first call on.
func (w *world) startProbes(perSecond int) {
	w.t.Helper()
	w.startClient(w.clientProbes(perSecond))
	w.startStranger(w.strangerProbes(perSecond))
	w.progress(10)
}

// progress waits until each prober has made so many more tries.
func (w *world) progress(tries int64) {
	w.t.Helper()
	for _, p := range []*proc{w.client, w.stranger} {
		before := w.ask(p)
		w.eventually(fmt.Sprintf("%d more tries of %s", tries, p.name), func() bool {
			now := w.ask(p)
			for name, c := range now.Probes {
				if c.Tries < before.Probes[name].Tries+tries {
					return false
				}
			}
			return true
		})
	}
}

// verdict of a run with both probers.
type verdict struct{ client, stranger, guarded, forbidden, echo report }

// conclude ends the probes, prints what they measured, and fails for each call that was not as the
// policies say, by the counts of both ends.
func (w *world) conclude(began time.Time) verdict {
	w.t.Helper()
	v := verdict{client: w.finish(w.client), stranger: w.finish(w.stranger)}
	took := time.Since(began)
	v.guarded, v.forbidden, v.echo = w.ask(w.guarded), w.ask(w.forbidden), w.ask(w.echo)
	for _, r := range []report{v.client, v.stranger} {
		for _, name := range slices.Sorted(maps.Keys(r.Probes)) {
			c := r.Probes[name]
			w.t.Logf("%-14s %6d tries (%.0f/s): %d went well, longest %v; errors %v", name, c.Tries,
				float64(c.Tries)/took.Seconds(), c.OK, c.Longest.Round(time.Millisecond), c.Errors)
		}
	}
	w.t.Logf("served: guarded %v, forbidden %v, echo %v", v.guarded.Served, v.forbidden.Served, v.echo.Served)
	for name, c := range v.client.Probes {
		if c.failed() > 0 || c.OK == 0 {
			w.t.Errorf("client: probe %s: %d of %d tries failed: %v; the first: %s", name, c.failed(), c.Tries, c.Errors, firstFails(c, began))
		}
	}
	for name, c := range v.stranger.Probes {
		connected := c.OK
		for why, n := range c.Errors {
			if strings.HasPrefix(why, "connected") {
				connected += n
			}
		}
		if connected > 0 || c.Tries == 0 {
			w.t.Errorf("stranger: probe %s: %d of %d connections came to be: %v", name, connected, c.Tries, c.Errors)
		}
	}
	// At the other end: as many as the client says, and nobody else.
	allowed := v.client.Probes["allowed"].OK
	want := map[string]int64{"client": allowed, "flow": 1, "accepted": allowed + 1}
	if v.client.Probes["flow"].Tries == 0 {
		want = map[string]int64{"client": allowed, "accepted": allowed}
	}
	if !maps.Equal(v.guarded.Served, want) {
		w.t.Errorf("guarded served %v, want %v", v.guarded.Served, want)
	}
	if len(v.forbidden.Served) > 0 {
		w.t.Errorf("forbidden served %v, want nobody", v.forbidden.Served)
	}
	if got, want := v.echo.Served, map[string]int64{"unconnected": v.client.Probes["udp"].OK, "connected": v.client.Probes["udp-connected"].OK}; !maps.Equal(got, want) {
		w.t.Errorf("echo served %v, want %v", got, want)
	}
	return v
}

func firstFails(c counts, began time.Time) string {
	var out []string
	for _, f := range c.Fails[:min(5, len(c.Fails))] {
		out = append(out, fmt.Sprintf("%s at %v, after %v", f.Why, time.Unix(0, f.At).Sub(began).Round(time.Millisecond), time.Duration(f.Took).Round(time.Millisecond)))
	}
	return strings.Join(out, "; ")
}
