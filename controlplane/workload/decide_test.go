package workload

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/identity"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// FuzzRunRequest: whatever a local process sends is refused, or names one service by good names.
func FuzzRunRequest(f *testing.F) {
	for _, req := range []*nodepb.RunRequest{
		{Kind: &nodepb.RunRequest_Start{Start: &nodepb.Start{Service: "cart", RunId: "r1"}}},
		{Kind: &nodepb.RunRequest_Start{Start: &nodepb.Start{Service: "cart", RunId: "r1", Managed: &nodepb.Managed{Uid: 7, Cgroup: "/sys/fs/cgroup/inlay/x"}}}},
		{Kind: &nodepb.RunRequest_Listening{Listening: &nodepb.Listening{Port: 8080, Address: "[::1]:80"}}},
	} {
		raw, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		req := &nodepb.RunRequest{}
		if proto.Unmarshal(raw, req) != nil {
			return
		}
		if start, err := readStart(req); err == nil {
			if m := start.managed; (m != nil) != (req.GetStart().GetManaged() != nil) || m != nil && m.cgroup != "" && m.cgroup[0] != '/' {
				t.Errorf("accepted %+v", start)
			}
			if identity.CheckName(start.svc.name) != nil || identity.CheckName(start.svc.namespace) != nil ||
				start.svc.namespace == identity.ReservedNamespace || start.runID == "" {
				t.Errorf("accepted %+v", start)
			}
		}
		if b, err := readListening(req.GetListening()); err == nil && (b.port == 0 || !b.address.IsValid() || b.address.Port() == 0) {
			t.Errorf("accepted %+v", b)
		}
	})
}

// FuzzManagedFile: what stands in the file is refused, or names a service and a cgroup.
func FuzzManagedFile(f *testing.F) {
	f.Add([]byte(`{"format":"inlay-managed-runs","version":1,"runs":[{"runId":"r1","namespace":"default","service":"cart","uid":7,"cgroup":"/c","port":80,"address":"127.0.0.1:80"}]}`))
	f.Add([]byte(`{"format":"inlay-managed-runs","version":2}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		runs, _ := decodeManaged(raw)
		for _, r := range runs {
			start, err := r.start()
			if err != nil || identity.CheckName(start.svc.name) != nil || start.runID == "" || start.managed.cgroup[0] != '/' {
				t.Errorf("accepted %+v: %v", r, err)
			}
		}
	})
}

func TestBackoffIsBounded(t *testing.T) {
	for failures := range 200 {
		for _, random := range []float64{0, 0.5, 0.999} {
			d := backoffFor(failures, retryBase, retryMax, random)
			if d < 80*time.Millisecond || d > retryMax {
				t.Fatalf("after %d failures: %s, want 80ms to %s", failures, d, retryMax)
			}
		}
	}
	if a, b := backoffFor(0, retryBase, retryMax, 0.5), backoffFor(3, retryBase, retryMax, 0.5); b <= a {
		t.Errorf("%s, then %s: want that it grows", a, b)
	}
}

type fixedClock struct{ now time.Time }

func (c fixedClock) Now() time.Time { return c.now }

func (fixedClock) AfterFunc(time.Duration, func()) func() bool { return func() bool { return true } }

// When an SVID of an hour is renewed: at half of its life, a little earlier at random, while the
// service runs or ran within an hour; afterwards it rests until it expires.
func TestDue(t *testing.T) {
	began := time.Now().Truncate(time.Second)
	chain := selfSigned(t, began.Add(time.Hour))
	for name, tc := range map[string]struct {
		users    int
		released time.Duration // after began
		stale    bool
		random   float64
		want     time.Duration // after began
		renew    bool
	}{
		"at half while it runs":          {users: 1, want: 30 * time.Minute, renew: true},
		"earlier by a twentieth of life": {users: 1, random: 0.9999999, want: 27 * time.Minute, renew: true},
		"at half after it ran":           {released: time.Minute, want: 30 * time.Minute, renew: true},
		"never when it ran an SVID ago":  {released: -40 * time.Minute, want: time.Hour},
		"at once when its root is gone":  {users: 1, stale: true, want: 10 * time.Minute, renew: true},
	} {
		t.Run(name, func(t *testing.T) {
			i := newIssuer(issuerConfig{clock: fixedClock{began.Add(10 * time.Minute)}, random: func() float64 { return tc.random }})
			e := &entry{users: tc.users, released: began.Add(tc.released), stale: tc.stale, issued: began, chain: chain}
			at, renew := i.due(e)
			if got := at.Sub(began).Round(time.Second); got != tc.want || renew != tc.renew {
				t.Errorf("due after %s, renew %v; want %s, %v", got, renew, tc.want, tc.renew)
			}
		})
	}
}

// sleptClock is of a machine that was suspended: the wall went on, timers did not.
type sleptClock struct{ suspended *atomic.Int64 }

func (c sleptClock) Now() time.Time {
	return time.Now().Round(0).Add(time.Duration(c.suspended.Load()))
}

func (sleptClock) AfterFunc(d time.Duration, f func()) func() bool { return time.AfterFunc(d, f).Stop }

// A laptop that was suspended past the end of every SVID renews them when it wakes up.
func TestRenewalAfterASuspendedNight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := sleptClock{suspended: new(atomic.Int64)}
		i := newIssuer(issuerConfig{clock: clock, random: func() float64 { return 0 }})
		began := clock.Now()
		e := &entry{users: 1, issued: began, chain: selfSigned(t, began.Add(time.Hour)), kick: make(chan struct{}, 1)}
		renew := make(chan bool, 1)
		go func() { renew <- i.rest(t.Context(), e) }()
		time.Sleep(time.Minute) // of the bubble
		clock.suspended.Store(int64(8 * time.Hour))
		woke := time.Now()
		if !<-renew {
			t.Error("it is not to be renewed")
		}
		if late := time.Since(woke); late > 5*time.Second {
			t.Errorf("renewed %s after the machine woke up, want within 5s", late)
		}
	})
}

func selfSigned(t *testing.T, notAfter time.Time) [][]byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: notAfter}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return [][]byte{der}
}
