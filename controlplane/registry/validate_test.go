package registry

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

func TestDecodeRefuses(t *testing.T) {
	many := make(map[string]string)
	for i := range 65 {
		many[strings.Repeat("k", i+1)] = "v"
	}
	port := func(change func(*registrypb.Port)) func(*registrypb.Instance) {
		return func(in *registrypb.Instance) { change(in.Ports[0]) }
	}
	address := func(s string) func(*registrypb.Instance) {
		return port(func(p *registrypb.Port) { p.Addresses = []string{s} })
	}
	for name, tc := range map[string]struct {
		change func(*registrypb.Instance)
		want   string
	}{
		"no id":                   {func(in *registrypb.Instance) { in.InstanceId = "" }, "instance_id"},
		"an id with a newline":    {func(in *registrypb.Instance) { in.InstanceId = "a\nb" }, "visible ASCII"},
		"a service with a dot":    {func(in *registrypb.Instance) { in.Service = "a.b" }, "service \"a.b\": '.' at character 2"},
		"a service in capitals":   {func(in *registrypb.Instance) { in.Service = "Orders" }, "want lower-case letters, digits and inner dashes"},
		"a long namespace":        {func(in *registrypb.Instance) { in.Namespace = strings.Repeat("a", 64) }, "namespace"},
		"the mesh's namespace":    {func(in *registrypb.Instance) { in.Namespace = "inlay" }, "the mesh's own"},
		"the mesh's suffix":       {func(in *registrypb.Instance) { in.Namespace = "mesh" }, "NAME.mesh is no name of a service"},
		"this machine":            {func(in *registrypb.Instance) { in.Service = "localhost" }, "the machine itself"},
		"two versions":            {func(in *registrypb.Instance) { in.Labels = map[string]string{"version": "v2"} }, "want one of them, or the same"},
		"too many labels":         {func(in *registrypb.Instance) { in.Labels = many }, "65 of them: want at most 64"},
		"a long label":            {func(in *registrypb.Instance) { in.Labels = map[string]string{"k": strings.Repeat("v", 257)} }, "want at most 256"},
		"too much weight":         {func(in *registrypb.Instance) { in.Weight = 10_001 }, "weight 10001: want 1 to 10000"},
		"no tls":                  {func(in *registrypb.Instance) { in.Tls = 0 }, "want TLS_MESH"},
		"a tls of the future":     {func(in *registrypb.Instance) { in.Tls = 9 }, "want TLS_MESH"},
		"too many ports":          {func(in *registrypb.Instance) { in.Ports = make([]*registrypb.Port, 65) }, "ports: 65 of them: want at most 64"},
		"a source that is a name": {func(in *registrypb.Instance) { in.Addresses = []string{"10.0.0.1", "host"} }, `addresses[1] "host": want an IP address`},
		"a source with a zone":    {func(in *registrypb.Instance) { in.Addresses = []string{"fe80::1%eth0"} }, "a zone means something on one machine only"},
		"a source that is all":    {func(in *registrypb.Instance) { in.Addresses = []string{"::"} }, "no connection comes from there"},
		"too many sources":        {func(in *registrypb.Instance) { in.Addresses = make([]string, 65) }, "addresses: 65 of them: want at most 64"},
		"a nil port":              {func(in *registrypb.Instance) { in.Ports = []*registrypb.Port{nil} }, "ports[0]: port 0"},
		"a port beyond":           {port(func(p *registrypb.Port) { p.Port = 65536 }), "port 65536: want the service's port, 1 to 65535"},
		"a port twice":            {func(in *registrypb.Instance) { in.Ports = append(in.Ports, in.Ports[0]) }, "ports[1]: port 8080 is there twice"},
		"no protocol":             {port(func(p *registrypb.Port) { p.Protocol = 0 }), "want PROTOCOL_GRPC"},
		"no address":              {port(func(p *registrypb.Port) { p.Addresses = nil }), "0 addresses"},
		"a name":                  {address("localhost:80"), "want ip:port"},
		"all addresses":           {address("0.0.0.0:80"), "the unspecified address cannot be called"},
		"all v6 addresses":        {address("[::]:80"), "the unspecified address cannot be called"},
		"mapped all addresses":    {address("[::ffff:0.0.0.0]:80"), "the unspecified address cannot be called"},
		"multicast":               {address("224.0.0.1:80"), "one machine"},
		"a zone":                  {address("[fe80::1%eth0]:80"), "zone"},
		"port zero":               {address("10.0.0.1:0"), "want a port"},
	} {
		t.Run(name, func(t *testing.T) {
			in := proto.CloneOf(instance(nil).GetInstance())
			tc.change(in)
			if _, err := decode(in); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("err = %v, want %q", err, tc.want)
			}
		})
	}
}

func TestDecodeReportsAllFaultsAtOnce(t *testing.T) {
	_, err := decode(&registrypb.Instance{})
	for _, want := range []string{"instance_id", "namespace", "service", "tls"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("err = %v, want %q in it", err, want)
		}
	}
}

func TestDecodePlainPortsAndWorkloads(t *testing.T) {
	in := proto.CloneOf(instance(nil).GetInstance())
	in.Ports = []*registrypb.Port{
		{Port: 53, Protocol: registrypb.Protocol_PROTOCOL_UDP, Addresses: []string{"10.0.0.1:53"}},
		{Port: 53, Protocol: registrypb.Protocol_PROTOCOL_TCP, Addresses: []string{"10.0.0.1:53"}},
	}
	in.Addresses = []string{"::ffff:10.0.0.2", "10.0.0.1", "10.0.0.2"}
	got, err := decode(in)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Ports) != 2 || got.Ports[0].Protocol != "UDP" || !got.Ports[0].UDP() || got.Ports[1].Protocol != "TCP" || got.Ports[1].UDP() {
		t.Errorf("ports = %+v", got.Ports)
	}
	if want := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}; !slices.Equal(got.Addresses, want) {
		t.Errorf("addresses = %v, want %v: sorted, each once, not mapped", got.Addresses, want)
	}
	in.Ports, in.Addresses = nil, nil
	if got, err = decode(in); err != nil || len(got.Ports) != 0 || len(got.Addresses) != 0 {
		t.Errorf("without ports: %+v, %v", got, err)
	}
}

func FuzzDecode(f *testing.F) {
	seed, err := proto.Marshal(instance(nil).GetInstance())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		var m registrypb.Instance
		if proto.Unmarshal(b, &m) != nil {
			return
		}
		in, err := decode(&m)
		if err != nil {
			return
		}
		if in.ID == "" || in.Weight == 0 || in.Labels["version"] != in.Version {
			t.Errorf("accepted %+v", in)
		}
		for _, p := range in.Ports {
			if p.Port == 0 || p.Protocol == "" || len(p.Addresses) == 0 {
				t.Errorf("accepted port %+v", p)
			}
		}
	})
}
