package bpftest

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// TestRealClients asks for a service by its name and by its addresses with programs as they are:
// Go's resolver, glibc's, curl and Python.
func TestRealClients(t *testing.T) {
	k := newKit(t, settings{})
	client := k.workload("client", billing, false)
	names(t, k)
	for vip, listen := range map[netip.Addr]string{vip4: "127.0.0.1:0", vip6: "[::1]:0"} {
		l, err := net.Listen("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "this is orders")
		}))
		srv.Listener.Close()
		srv.Listener = l
		srv.Start()
		t.Cleanup(srv.Close)
		k.service(at(vip, 80), netip.MustParseAddrPort(l.Addr().String()), unix.IPPROTO_TCP, orders)
	}
	python := "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"
	for name, run := range map[string]func(url string) answer{
		"Go": func(url string) answer { return client.try(order{Op: "get", Name: url}) },
		"curl": func(url string) answer {
			return client.run(t, "curl", "-sS", "--noproxy", "*", "--max-time", "5", url)
		},
		"Python": func(url string) answer {
			return client.run(t, "env", "-u", "http_proxy", "-u", "HTTP_PROXY", "python3", "-c", python, url)
		},
	} {
		for kind, url := range map[string]string{
			"by name": "http://orders.default.mesh/", "by IPv4": fmt.Sprintf("http://%s/", vip4), "by IPv6": fmt.Sprintf("http://[%s]/", vip6),
			"by mapped IPv4": fmt.Sprintf("http://[::ffff:%s]/", vip4),
		} {
			if name == "Go" && kind == "by mapped IPv4" {
				continue // net dials it as IPv4
			}
			t.Run(name+" "+kind, func(t *testing.T) {
				if got := run(url); strings.TrimSpace(string(got.Data)) != "this is orders" {
					t.Errorf("GET %s: %q", url, got.Data)
				}
			})
		}
	}
	t.Run("glibc", func(t *testing.T) {
		got := strings.Fields(string(client.run(t, "getent", "ahosts", "orders.default.mesh").Data))
		if len(got) == 0 || got[0] != vip4.String() && got[0] != vip6.String() {
			t.Errorf("getent: %q", got)
		}
	})
}

// run starts another program in the child's cgroup.
func (c *child) run(t *testing.T, args ...string) answer {
	t.Helper()
	for _, a := range args {
		if a == "curl" || a == "python3" || a == "getent" {
			if _, err := exec.LookPath(a); err != nil {
				lacks(t, err.Error())
			}
		}
	}
	b, err := json.Marshal(args)
	if err != nil {
		t.Fatal(err)
	}
	return c.must(order{Op: "run", Data: b})
}

// names serves DNS as the node's proxy would, in this process, which no hook sees.
func names(t *testing.T, k *kit) {
	t.Helper()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan struct{})
	srv := &dns.Server{PacketConn: udp, NotifyStartedFunc: func() { close(started) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg).SetReply(q)
		head := dns.RR_Header{Name: q.Question[0].Name, Rrtype: q.Question[0].Qtype, Class: dns.ClassINET, Ttl: 5}
		switch {
		case !strings.EqualFold(q.Question[0].Name, "orders.default.mesh."):
			r.Rcode = dns.RcodeNameError
		case q.Question[0].Qtype == dns.TypeA:
			r.Answer = append(r.Answer, &dns.A{Hdr: head, A: vip4.AsSlice()})
		case q.Question[0].Qtype == dns.TypeAAAA:
			r.Answer = append(r.Answer, &dns.AAAA{Hdr: head, AAAA: vip6.AsSlice()})
		}
		w.WriteMsg(r)
	})}
	done := make(chan error)
	go func() { done <- srv.ActivateAndServe() }()
	<-started
	t.Cleanup(func() {
		srv.Shutdown()
		<-done
	})
	where := netip.MustParseAddrPort(udp.LocalAddr().String())
	k.put("dns_proxies", netnsCookie(t), bpfobj.InlayDnsProxy{
		Addr4: addr(where.Addr()), Port4: be16(where.Port()), Heartbeat: monotonic(t) + 60e9, // it does not die in this test
	})
}
