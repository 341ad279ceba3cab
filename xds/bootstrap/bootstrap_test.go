package bootstrap_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/inlay-mesh/inlay/xds/bootstrap"
)

const full = `{
  "xds_servers": [
    {"server_uri": "cp:15012", "channel_creds": [{"type": "google_default"}, {"type": "inlay_svid", "config": {"a": 1}}, {"type": "insecure"}],
     "server_features": ["xds_v3", "news"], "later": true},
    {"server_uri": "unix:/run/cp.sock", "channel_creds": [{"type": "insecure"}]}
  ],
  "node": {"id": "n", "cluster": "c", "metadata": {"INLAY_SERVICE": "cart", "n": 1.5}, "locality": {"region": "r", "zone": "z", "sub_zone": "s"}, "more": {}},
  "certificate_providers": {"default": {"plugin_name": "file_watcher", "config": {}}},
  "server_listener_resource_name_template": "grpc/server?xds.resource.listening_address=%s",
  "authorities": {"x": {}}
}`

func TestParse(t *testing.T) {
	b, err := bootstrap.Parse([]byte(full))
	if err != nil {
		t.Fatal(err)
	}
	if s := b.Servers[0]; s.URI != "cp:15012" || s.Creds.Type != bootstrap.CredsSVID || string(s.Creds.Config) != `{"a": 1}` || !s.Has("xds_v3") || s.Has("x") {
		t.Errorf("first server %+v: want the first supported credentials", s)
	}
	if s := b.Servers[1]; s.URI != "unix:/run/cp.sock" || s.Creds.Type != bootstrap.CredsInsecure {
		t.Errorf("second server %+v", s)
	}
	if n := b.Node; n.ID != "n" || n.Cluster != "c" || n.Metadata["n"] != 1.5 || n.Locality != (bootstrap.Locality{Region: "r", Zone: "z", SubZone: "s"}) {
		t.Errorf("node %+v", n)
	}
	if b.ServerListenerTemplate != bootstrap.ServerListenerTemplate || !bytes.Contains(b.CertificateProviders, []byte("file_watcher")) {
		t.Errorf("bootstrap %+v", b)
	}
	again, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	var was, is any
	if json.Unmarshal([]byte(full), &was) != nil || json.Unmarshal(again, &is) != nil || !reflect.DeepEqual(was, is) {
		t.Errorf("encoded again:\n%s\nwant all of\n%s", again, full)
	}
}

func TestWrongBootstraps(t *testing.T) {
	for text, want := range map[string]string{
		``:                                     "want a JSON object",
		"{\n\"a\": }":                          "line 2",
		`[]`:                                   "want a JSON object",
		`null`:                                 "not null",
		`{}`:                                   "xds_servers is missing",
		`{"XDS_SERVERS":1}`:                    "xds_servers is missing", // names are exact
		`{"xds_servers":[]}`:                   "at least one server",
		`{"xds_servers":[{}]}`:                 "xds_servers[0]: server_uri",
		`{"xds_servers":[{"server_uri":1}]}`:   "xds_servers[0]: server_uri: want a string",
		`{"xds_servers":[{"server_uri":"a"}]}`: "channel_creds: want a list",
		`{"xds_servers":[{"server_uri":"a","channel_creds":[{"type":"x"}]}]}`:                                  `none of "x" is supported: want insecure, inlay_svid, tls`,
		`{"xds_servers":[{"server_uri":"a","channel_creds":[1]}]}`:                                             "channel_creds[0]",
		`{"xds_servers":[{"server_uri":"a","channel_creds":[{"type":"tls"}]}],"node":[]}`:                      "node: want a JSON object",
		`{"xds_servers":[{"server_uri":"a","channel_creds":[{"type":"tls"}]}],"node":{"id":1}}`:                "node: id: want a string",
		`{"xds_servers":[{"server_uri":"a","channel_creds":[{"type":"tls"}]}],"node":{"locality":{"zone":1}}}`: "locality: zone: want a string",
		`{"xds_servers":[{"server_uri":"a","channel_creds":[{"type":"tls"}],"server_features":1}]}`:            "server_features: want a list",
		`{"xds_servers":[{"server_uri":"a","channel_creds":[{"type":"tls"}]}],"certificate_providers":1}`:      "certificate_providers",
	} {
		if _, err := bootstrap.Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", text, err, want)
		}
	}
}

// machine is an environment and a file system.
type machine struct {
	env   map[string]string
	files map[string]string
	fails map[string]error
}

func (m machine) getenv(k string) string { return m.env[k] }
func (m machine) read(path string) ([]byte, error) {
	if err := m.fails[path]; err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if s, ok := m.files[path]; ok {
		return []byte(s), nil
	}
	return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
}

func TestWhereTheControlPlaneIs(t *testing.T) {
	inline := strings.ReplaceAll(full, "cp:15012", "inline:1")
	all := map[string]string{"GRPC_XDS_BOOTSTRAP": "/b.json", "GRPC_XDS_BOOTSTRAP_CONFIG": inline, "INLAY_ADDR": "addr:15012",
		"XDG_RUNTIME_DIR": "/run/u", "HOME": "/home/u", "INLAY_CONFIG": "/c"}
	without := func(names ...string) map[string]string {
		m := map[string]string{}
		for k, v := range all {
			m[k] = v
		}
		for _, n := range names {
			delete(m, n)
		}
		return m
	}
	files := map[string]string{"/b.json": full}
	// Reading a socket fails with ENXIO on Linux.
	sockets := map[string]error{"/run/u/inlay/controlplane.sock": syscall.ENXIO, "/home/u/.inlay/run/controlplane.sock": syscall.ENXIO}
	first3 := []string{"GRPC_XDS_BOOTSTRAP", "GRPC_XDS_BOOTSTRAP_CONFIG", "INLAY_ADDR"}
	for name, tc := range map[string]struct {
		m                 machine
		uri, creds, where string
	}{
		"the file first":           {machine{all, files, sockets}, "cp:15012", bootstrap.CredsSVID, "/b.json"},
		"then the text":            {machine{without(first3[:1]...), files, sockets}, "inline:1", bootstrap.CredsSVID, "GRPC_XDS_BOOTSTRAP_CONFIG"},
		"then the address":         {machine{without(first3[:2]...), files, sockets}, "addr:15012", bootstrap.CredsSVID, "INLAY_ADDR"},
		"then the run directory":   {machine{without(first3...), files, sockets}, "unix:/run/u/inlay/controlplane.sock", bootstrap.CredsInsecure, "socket /run/u"},
		"or the one at home":       {machine{without(append(first3, "XDG_RUNTIME_DIR")...), files, sockets}, "unix:/home/u/.inlay/run/controlplane.sock", bootstrap.CredsInsecure, "/home/u"},
		"else a snapshot":          {machine{without(first3...), files, nil}, "", "", "INLAY_CONFIG=/c"},
		"an address may be a path": {machine{map[string]string{"INLAY_ADDR": "unix:/x.sock"}, nil, nil}, "unix:/x.sock", bootstrap.CredsInsecure, "INLAY_ADDR"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := bootstrap.Load(tc.m.getenv, tc.m.read)
			if err != nil {
				t.Fatal(err)
			}
			var uri, creds string
			if len(b.Servers) > 0 {
				uri, creds = b.Servers[0].URI, b.Servers[0].Creds.Type
			}
			if uri != tc.uri || creds != tc.creds || !strings.Contains(b.Source, tc.where) {
				t.Errorf("got %q by %q from %q, want %q by %q from %q", uri, creds, b.Source, tc.uri, tc.creds, tc.where)
			}
		})
	}
	if _, err := bootstrap.Load(machine{}.getenv, machine{}.read); !errors.Is(err, bootstrap.ErrNotFound) {
		t.Errorf("nothing at hand: %v", err)
	}
}

func TestWrongEnvironmentNamesPlaceAndRemedy(t *testing.T) {
	for name, tc := range map[string]struct {
		env  map[string]string
		want []string
	}{
		"missing file":    {map[string]string{"GRPC_XDS_BOOTSTRAP": "/none"}, []string{"GRPC_XDS_BOOTSTRAP", "/none", "inlay bootstrap"}},
		"wrong file":      {map[string]string{"GRPC_XDS_BOOTSTRAP": "/bad"}, []string{"/bad", "xds_servers"}},
		"wrong text":      {map[string]string{"GRPC_XDS_BOOTSTRAP_CONFIG": "{}"}, []string{"GRPC_XDS_BOOTSTRAP_CONFIG", "xds_servers"}},
		"wrong address":   {map[string]string{"INLAY_ADDR": "host"}, []string{"INLAY_ADDR", `"host"`, "HOST:PORT", "unix:PATH"}},
		"relative socket": {map[string]string{"INLAY_ADDR": "unix:x"}, []string{"absolute"}},
		"all faults at once": {map[string]string{"INLAY_SERVICE": "a.b.c", "INLAY_LABELS": "x", "INLAY_LISTEN": "1", "INLAY_DISABLED": "maybe", "SPIFFE_ENDPOINT_SOCKET": "/x"},
			[]string{"INLAY_SERVICE", "INLAY_LABELS", "INLAY_LISTEN", "INLAY_DISABLED", "SPIFFE_ENDPOINT_SOCKET"}},
	} {
		m := machine{tc.env, map[string]string{"/bad": "{}"}, nil}
		_, err := bootstrap.Load(m.getenv, m.read)
		for _, want := range tc.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v: want %q in it", name, err, want)
			}
		}
	}
}

func TestEnvironment(t *testing.T) {
	m := machine{env: map[string]string{"INLAY_SERVICE": "cart.shop", "INLAY_LABELS": "version=v1, tier=web", "INLAY_DISABLED": "1", "HOME": "/h",
		"INLAY_ADDR_MY_SVC_SHOP": "1.2.3.4:5", "INLAY_ADDR_BAD": "x", "INLAY_RUN_ID": "r1", "INLAY_LISTEN": "127.0.0.1:0", "INLAY_ADDR": "cp:1"}}
	e, err := bootstrap.ReadEnv(m.getenv)
	if err != nil {
		t.Fatal(err)
	}
	if e.Service != "cart" || e.Namespace != "shop" || e.Labels["tier"] != "web" || !e.Disabled || e.RunID != "r1" || e.Listen != "127.0.0.1:0" ||
		e.StateDir != "" || e.WorkloadSocket != "unix:///h/.inlay/run/workload.sock" {
		t.Errorf("environment %+v", e)
	}
	if a, err := e.AddrOf("my-svc.shop"); a != "1.2.3.4:5" || err != nil {
		t.Errorf("AddrOf: %q, %v", a, err)
	}
	if a, err := e.AddrOf("other"); a != "" || err != nil {
		t.Errorf("AddrOf an unset one: %q, %v", a, err)
	}
	if _, err := e.AddrOf("bad"); err == nil || !strings.Contains(err.Error(), "INLAY_ADDR_BAD") {
		t.Errorf("AddrOf a wrong one: %v", err)
	}
	b, err := bootstrap.Load(m.getenv, m.read)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"INLAY_SERVICE": "cart", "INLAY_NAMESPACE": "shop", "INLAY_VERSION": "v1", "INLAY_LABELS": map[string]any{"version": "v1", "tier": "web"}}
	if !reflect.DeepEqual(b.Node.Metadata, want) {
		t.Errorf("metadata %v, want %v", b.Node.Metadata, want)
	}
}

func TestGenerate(t *testing.T) {
	raw, err := bootstrap.Generate(bootstrap.Client{ServerURI: "127.0.0.1:15010", NodeID: "cart-1", Service: "cart", Namespace: "shop"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := bootstrap.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if s := b.Servers[0]; s.URI != "127.0.0.1:15010" || s.Creds.Type != bootstrap.CredsInsecure || !s.Has("xds_v3") {
		t.Errorf("server %+v", s)
	}
	if b.Node.ID != "cart-1" || b.Node.Metadata["INLAY_SERVICE"] != "cart" || b.Node.Metadata["INLAY_NAMESPACE"] != "shop" || b.ServerListenerTemplate != bootstrap.ServerListenerTemplate {
		t.Errorf("bootstrap %+v", b)
	}
	if _, err := bootstrap.Generate(bootstrap.Client{}); err == nil {
		t.Error("an empty client was accepted")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := bootstrap.Parse(raw)
		if err != nil {
			return
		}
		again, err := b.Encode()
		if err != nil {
			t.Fatal(err)
		}
		b2, err := bootstrap.Parse(again)
		if err != nil {
			t.Fatalf("%v in %s", err, again)
		}
		last, err := b2.Encode()
		if err != nil || !bytes.Equal(again, last) {
			t.Fatalf("changed: %v\n%s\n%s", err, again, last)
		}
		b.Source, b2.Source = "", ""
		if len(b.Servers) != len(b2.Servers) || !reflect.DeepEqual(b.Node.Metadata, b2.Node.Metadata) || b.Servers[0].URI != b2.Servers[0].URI ||
			b.Servers[0].Creds.Type != b2.Servers[0].Creds.Type || b.ServerListenerTemplate != b2.ServerListenerTemplate || b.Node.ID != b2.Node.ID {
			t.Fatalf("changed:\n%+v\n%+v", b, b2)
		}
	})
}
