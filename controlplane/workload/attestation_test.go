//go:build linux

package workload_test

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/workload"
)

// Each test is one sentence of what `inlay run` promises, told by real processes.
func TestAttestation(t *testing.T) {
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	const (
		cart    = "spiffe://inlay.local/ns/default/svc/cart"
		orders  = "spiffe://inlay.local/ns/default/svc/orders"
		outside = "PermissionDenied process"
	)
	for name, tc := range map[string]struct {
		words []string
		want  []string // beginning of each line
	}{
		"a child is the service":                 {[]string{"root", "cart", "r1", "fetch"}, []string{cart}},
		"the SDK's client gets it too":           {[]string{"root", "cart", "r14", "client"}, []string{cart}},
		"a grandchild is the service":            {[]string{"root", "cart", "r2", "root", "cart", "r2b", "fetch"}, []string{cart}},
		"an orphaned grandchild is the service":  {[]string{"root", "cart", "r3", "orphan", "fetch"}, []string{cart}},
		"an orphan of an orphan is the service":  {[]string{"root", "cart", "r4", "orphan", "orphan", "fetch"}, []string{cart}},
		"the root itself is not":                 {[]string{"root", "cart", "r5", "self", "fetch"}, []string{outside, cart}},
		"a process outside is nobody":            {[]string{"fetch"}, []string{outside}},
		"the nearest registration wins":          {[]string{"root", "cart", "r6", "root", "orders", "r7", "fetch"}, []string{orders}},
		"a nested root is of the outer service":  {[]string{"root", "cart", "r8", "root", "orders", "r9", "self", "fetch"}, []string{cart, orders}},
		"an orphan stays below the nearest root": {[]string{"root", "cart", "r10", "root", "orders", "r11", "orphan", "fetch"}, []string{orders}},
		"a name that is no name cannot be run":   {[]string{"root", "Cart", "r12", "fetch"}, []string{"InvalidArgument"}},
		"a path is no name":                      {[]string{"root", "a/b", "r13", "fetch"}, []string{"InvalidArgument"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := run(t, h, tc.words...)
			if len(got) != len(tc.want) {
				t.Fatalf("printed %q, want %q", got, tc.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], tc.want[i]) {
					t.Errorf("printed %q, want %q", got, tc.want)
				}
			}
		})
	}
	t.Run("the refusal says the remedy", func(t *testing.T) {
		if got := run(t, h, "fetch")[0]; !strings.Contains(got, "inlay run --service NAME -- CMD") {
			t.Errorf("printed %q", got)
		}
	})
}

func TestAnotherUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "becoming another user needs root")
	}
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(nil)
	got := run(t, h, "root", "cart", "r1", "setuid", "65534", "fetch")
	if !strings.HasPrefix(got[0], "PermissionDenied") || !strings.Contains(got[0], "of user 65534") {
		t.Errorf("a process of another user below the root: %q, want PermissionDenied that says so", got)
	}
	got = run(t, h, "setuid", "65534", "root", "cart", "r2", "fetch")
	if !slices.Equal(got, []string{"PermissionDenied user 65534 may not run cart.default: start the node with --allow 65534=default/cart"}) {
		t.Errorf("another user runs a service: %q, want PermissionDenied", got)
	}
}

// Where the configuration lists users, it lists everybody: the node's own user too.
func TestConfiguredUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "becoming another user needs root")
	}
	h := newHouse(t, time.Hour)
	h.startControlPlane()
	h.startNode(func(c *workload.Config) {
		c.Users = map[uint32][]string{65534: {"cart", "shop/orders"}}
	})
	for name, tc := range map[string]struct {
		words []string
		want  string
	}{
		"a listed service":                   {[]string{"setuid", "65534", "root", "cart", "r1", "fetch"}, "spiffe://inlay.local/ns/default/svc/cart"},
		"a service that is not listed":       {[]string{"setuid", "65534", "root", "pay", "r2", "fetch"}, "PermissionDenied user 65534 may not run pay.default"},
		"a service of another namespace":     {[]string{"setuid", "65534", "root", "orders", "r3", "fetch"}, "PermissionDenied user 65534 may not run orders.default"},
		"the node's user, who is not listed": {[]string{"root", "cart", "r4", "fetch"}, "PermissionDenied user 0 may not run cart.default"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := run(t, h, tc.words...); !strings.HasPrefix(got[0], tc.want) {
				t.Errorf("printed %q, want %q", got, tc.want)
			}
		})
	}
}

// skip leaves out what this machine cannot do; in CI, which can, that is a failure.
func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}
