package route_test

import (
	"testing"

	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
	"github.com/inlay-mesh/inlay/xds/resource"
)

func TestHost(t *testing.T) {
	hosts := []resource.VirtualHost{
		{Name: "any", Domains: []string{"*"}},
		{Name: "prefix", Domains: []string{"orders.*"}},
		{Name: "longer prefix", Domains: []string{"orders.shop.*"}},
		{Name: "suffix", Domains: []string{"*.shop"}},
		{Name: "longer suffix", Domains: []string{"*-eu.shop"}},
		{Name: "exact", Domains: []string{"pay", "orders.SHOP"}},
		{Name: "port", Domains: []string{"orders.shop:9090"}},
	}
	for name, tc := range map[string]struct{ in, want string }{
		"an exact name wins over wildcards":       {"orders.shop", "exact"},
		"a port is ignored":                       {"orders.shop:8080", "exact"},
		"case does not matter":                    {"PAY", "exact"},
		"the very name with its port wins":        {"orders.shop:9090", "port"},
		"a suffix wins over a prefix":             {"orders.eu.shop", "suffix"},
		"the longest suffix wins":                 {"cart-eu.shop", "longer suffix"},
		"the longest prefix wins":                 {"orders.shop.eu", "longer prefix"},
		"a wildcard does not match nothing":       {"-eu.shop", "suffix"},
		"anything else goes to the host of all":   {"other", "any"},
		"an IPv6 literal is not cut at its colon": {"::1", "any"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := route.Host(hosts, tc.in); got == nil || got.Name != tc.want {
				t.Errorf("Host(%q) = %v, want %q", tc.in, got, tc.want)
			}
		})
	}
	if got := route.Host(hosts[1:], "other"); got != nil {
		t.Errorf("Host without a match = %q, want none", got.Name)
	}
}
