package main

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestRegistration(t *testing.T) {
	for name, tc := range map[string]struct {
		flags runFlags
		want  string // of the error; empty: none
		check func(registration) bool
	}{
		"the least":            {runFlags{service: "cart"}, "", func(r registration) bool { return r.namespace == "default" && r.service == "cart" && r.port == 0 }},
		"another namespace":    {runFlags{service: "cart.shop"}, "", func(r registration) bool { return r.namespace == "shop" && r.service == "cart" }},
		"a version is a label": {runFlags{service: "cart", version: "v2"}, "", func(r registration) bool { return r.version == "v2" && r.labels["version"] == "v2" }},
		"labels": {runFlags{service: "cart", labels: []string{"zone=a", "empty=", "x=1=2"}}, "", func(r registration) bool {
			return r.labels["zone"] == "a" && r.labels["x"] == "1=2" && len(r.labels) == 3
		}},
		"a port": {runFlags{service: "cart", port: "8080"}, "", func(r registration) bool {
			return r.port == 8080 && r.local == netip.MustParseAddrPort("127.0.0.1:8080")
		}},
		"another local port":      {runFlags{service: "cart", port: "80:8080"}, "", func(r registration) bool { return r.port == 80 && r.local.Port() == 8080 }},
		"datagrams":               {runFlags{service: "dns", port: "53:5353/udp", ebpf: true}, "", func(r registration) bool { return r.udp && r.port == 53 && r.local.Port() == 5353 }},
		"datagrams behind a word": {runFlags{service: "cart", port: "53/tcp", ebpf: true}, "with /udp behind it", nil},
		"no service":              {runFlags{}, "--service is missing", nil},
		"a wrong service":         {runFlags{service: "Cart"}, `service "Cart"`, nil},
		"a label without value":   {runFlags{service: "cart", labels: []string{"zone"}}, `--label "zone": want KEY=VALUE`, nil},
		"a label without name":    {runFlags{service: "cart", labels: []string{"=a"}}, `--label "=a"`, nil},
		"a label with a comma":    {runFlags{service: "cart", labels: []string{"zone=a,b"}}, "want no comma", nil},
		"a version with a comma":  {runFlags{service: "cart", version: "v1,v2"}, "want no comma", nil},
		"port 0":                  {runFlags{service: "cart", port: "0"}, `--port "0"`, nil},
		"a port too high":         {runFlags{service: "cart", port: "65536"}, "1 to 65535", nil},
		"a name for a port":       {runFlags{service: "cart", port: "http"}, "PORT or PORT:LOCALPORT", nil},
		"three ports":             {runFlags{service: "cart", port: "1:2:3"}, "PORT or PORT:LOCALPORT", nil},
		"a port and nothing more": {runFlags{service: "cart", port: "80:"}, "PORT or PORT:LOCALPORT", nil},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := tc.flags.registration()
			if tc.want != "" {
				var coded *exitError
				if err == nil || !strings.Contains(err.Error(), tc.want) || !errors.As(err, &coded) || coded.code != exitUsage {
					t.Errorf("error %v, want a usage error that says %q", err, tc.want)
				}
				return
			}
			if err != nil || !tc.check(r) {
				t.Errorf("%+v, %v", r, err)
			}
			if len(r.runID) != 16 {
				t.Errorf("run id %q, want 16 digits", r.runID)
			}
		})
	}
	flags := runFlags{service: "cart"}
	a, _ := flags.registration()
	b, _ := flags.registration()
	if a.runID == b.runID {
		t.Errorf("two runs have the id %s", a.runID)
	}
}

func TestEnvironment(t *testing.T) {
	const socket, control = "/run/inlay/workload.sock", "unix:/run/inlay/controlplane.sock"
	for name, tc := range map[string]struct {
		base []string
		reg  registration
		want []string
	}{
		"everything": {
			[]string{"PATH=/bin", "SPIFFE_ENDPOINT_SOCKET=unix:///old", "INLAY_SERVICE=other"},
			registration{namespace: "default", service: "cart", runID: "1", labels: map[string]string{"zone": "a", "version": "v1"}},
			[]string{"INLAY_ADDR=" + control, "INLAY_LABELS=version=v1,zone=a", "INLAY_LISTEN=127.0.0.1:0", "INLAY_RUN_ID=1", "INLAY_SERVICE=cart", "PATH=/bin", "SPIFFE_ENDPOINT_SOCKET=unix://" + socket},
		},
		"another namespace is said": {
			nil, registration{namespace: "shop", service: "cart", runID: "1"},
			[]string{"INLAY_ADDR=" + control, "INLAY_LISTEN=127.0.0.1:0", "INLAY_RUN_ID=1", "INLAY_SERVICE=cart.shop", "SPIFFE_ENDPOINT_SOCKET=unix://" + socket},
		},
		"a bootstrap of the user's stays, and so do address and labels": {
			[]string{"GRPC_XDS_BOOTSTRAP=/b.json", "INLAY_LABELS=zone=b", "INLAY_LISTEN=10.0.0.7:80"}, registration{namespace: "default", service: "cart", runID: "1"},
			[]string{"GRPC_XDS_BOOTSTRAP=/b.json", "INLAY_LABELS=zone=b", "INLAY_LISTEN=10.0.0.7:80", "INLAY_RUN_ID=1", "INLAY_SERVICE=cart", "SPIFFE_ENDPOINT_SOCKET=unix://" + socket},
		},
		"below another run its labels are not ours": {
			[]string{"INLAY_RUN_ID=0", "INLAY_LABELS=version=v9", "INLAY_SERVICE=outer"}, registration{namespace: "default", service: "cart", runID: "1"},
			[]string{"INLAY_ADDR=" + control, "INLAY_LISTEN=127.0.0.1:0", "INLAY_RUN_ID=1", "INLAY_SERVICE=cart", "SPIFFE_ENDPOINT_SOCKET=unix://" + socket},
		},
	} {
		t.Run(name, func(t *testing.T) {
			before := slices.Clone(tc.base)
			if got := environment(tc.base, tc.reg, socket, control); !slices.Equal(got, tc.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
			if !slices.Equal(before, tc.base) {
				t.Error("the process's own environment was changed")
			}
		})
	}
}

func TestParseUsers(t *testing.T) {
	for name, tc := range map[string]struct {
		flags []string
		dev   int
		want  map[uint32][]string
	}{
		"nothing leaves the node's default":     {nil, -1, nil},
		"one user":                              {[]string{"1000=cart"}, -1, map[uint32][]string{1000: {"cart"}}},
		"several services, said twice":          {[]string{"1000=cart,shop/orders", "1000=web", "0=*"}, -1, map[uint32][]string{1000: {"cart", "shop/orders", "web"}, 0: {"*"}}},
		"the user of dev may run everything":    {nil, 1000, map[uint32][]string{1000: {"*"}}},
		"the user of dev beside those who may":  {[]string{"7=cart"}, 0, map[uint32][]string{7: {"cart"}, 0: {"*"}}},
		"no services":                           {[]string{"1000="}, -1, nil},
		"no equals sign":                        {[]string{"1000"}, -1, nil},
		"a name for a user":                     {[]string{"ada=cart"}, -1, nil},
		"a negative user":                       {[]string{"-1=cart"}, -1, nil},
		"a user that is none":                   {[]string{"4294967296=cart"}, -1, nil},
		"the highest user there can be":         {[]string{"4294967295=cart"}, -1, map[uint32][]string{4294967295: {"cart"}}},
		"one wrong flag among good ones counts": {[]string{"1=a", "2"}, -1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseUsers(tc.flags, tc.dev)
			if wrong := tc.want == nil && len(tc.flags) > 0; wrong != (err != nil) {
				t.Fatalf("error %v", err)
			}
			if len(got) != len(tc.want) && err == nil {
				t.Fatalf("got %v, want %v", got, tc.want)
			}
			for uid, services := range tc.want {
				if !slices.Equal(got[uid], services) {
					t.Errorf("user %d: %v, want %v", uid, got[uid], services)
				}
			}
		})
	}
}

func TestListening(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	if !listening(t.Context(), lis.Addr().(*net.TCPAddr).AddrPort()) {
		t.Error("a listener was not seen")
	}
}
