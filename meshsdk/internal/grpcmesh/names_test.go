package grpcmesh

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	announced := func() []string { return []string{"shop", "billing"} }
	for name, tc := range map[string]struct {
		target, listener string
		mesh             bool
	}{
		"a single label is of the mesh":                {"orders", "orders", true},
		"the port is part of the name":                 {"orders:8080", "orders:8080", true},
		"leading zeros of a port are dropped":          {"orders:0080", "orders:80", true},
		"upper case is canonical":                      {"ORDERS.Shop", "orders.shop", true},
		"a trailing dot is canonical":                  {"orders.", "orders", true},
		"a trailing dot before the port too":           {"orders.shop.:80", "orders.shop:80", true},
		"the own namespace needs no announcement":      {"orders.default", "orders.default", true},
		"an announced namespace":                       {"orders.shop:80", "orders.shop:80", true},
		"an unknown namespace is outside":              {"orders.elsewhere", "", false},
		"the suffix is stripped":                       {"orders.mesh", "orders", true},
		"the suffix makes an unknown namespace ours":   {"orders.elsewhere.mesh:80", "orders.elsewhere:80", true},
		"the suffix with a trailing dot":               {"orders.mesh.", "orders", true},
		"mesh alone is a service":                      {"mesh", "mesh", true},
		"the suffix alone is no host":                  {".mesh", "", false},
		"xds":                                          {"xds:///orders.elsewhere", "orders.elsewhere", true},
		"xds in upper case":                            {"XDS:///Orders:80", "orders:80", true},
		"xds without slashes":                          {"xds:orders", "orders", true},
		"a service called xds":                         {"xds:8080", "xds:8080", true},
		"xds of another control plane is not ours":     {"xds://other/orders", "", false},
		"localhost is outside":                         {"localhost:8080", "", false},
		"a name under localhost is outside":            {"orders.localhost", "", false},
		"an IPv4 address is outside":                   {"10.0.0.1:80", "", false},
		"an IPv6 address is outside":                   {"[::1]:80", "", false},
		"an IPv6 address without brackets":             {"::1", "", false},
		"a short IPv4 address is outside":              {"127.1", "", false},
		"an IPv4 address in hexadecimal":               {"0x7f000001", "", false},
		"a number of any length":                       {strings.Repeat("9", 30), "", false},
		"another host is outside":                      {"api.example.com", "", false},
		"user information is no host":                  {"user@orders", "", false},
		"an empty label is no host":                    {"orders..shop", "", false},
		"a port out of range stays in the mesh":        {"orders:65536", "orders:65536", true},
		"a port of letters stays in the mesh":          {"orders:HTTP", "orders:http", true},
		"port zero stays in the mesh":                  {"orders:0", "orders:0", true},
		"an empty port is none":                        {"orders.:", "orders", true},
		"a second port is no host":                     {"orders:80:80", "", false},
		"empty is no host":                             {"", "", false},
		"a slash is no host":                           {"orders/x", "", false},
		"a single label that can be no service":        {"my_db", "my_db", true},
		"a NUL is no host":                             {"orders\x00", "", false},
		"percent signs are no host":                    {"orders%2eshop", "", false},
		"other letters are no host":                    {"örders", "", false},
		"a label of more than 63 bytes is no host":     {strings.Repeat("a", 64), "", false},
		"an IPv4 address with the suffix":              {"10.0.0.1.mesh", "", false},
		"xds with nothing behind it is no host":        {"xds:///", "", false},
		"two labels, the first of which is no service": {"my_db.shop", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			listener, mesh := Parse(tc.target, announced, "default")
			if listener != tc.listener || mesh != tc.mesh {
				t.Errorf("Parse(%q) = %q, %v, want %q, %v", tc.target, listener, mesh, tc.listener, tc.mesh)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"orders", "Orders.shop.:080", "xds:///orders.mesh", "127.1", "[::1]:80", "a.mesh.mesh"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, target string) {
		announced := func() []string { return []string{"shop"} }
		listener, mesh := Parse(target, announced, "default")
		if !mesh {
			if listener != "" {
				t.Fatalf("Parse(%q) = %q, false", target, listener)
			}
			return
		}
		// A canonical name is its own canonical form.
		again, ok := Parse("xds:///"+listener, announced, "default")
		if strings.HasSuffix(bareHost(listener), Suffix) {
			return // "a.mesh.mesh": one suffix goes each time
		}
		if !ok || again != listener {
			t.Fatalf("Parse(%q) = %q, and that is %q, %v", target, listener, again, ok)
		}
	})
}
