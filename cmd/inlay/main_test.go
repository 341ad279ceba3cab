package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/ebpf"
)

func TestReport(t *testing.T) {
	for name, tc := range map[string]struct {
		err  error
		code int
		text string
	}{
		"nothing went wrong":                      {nil, 0, ""},
		"an error without a code is 1":            {errors.New("no"), exitFailed, "inlay: no\n"},
		"an error carries its code":               {&exitError{exitAbsent, errors.New("nothing runs")}, exitAbsent, "inlay: nothing runs\n"},
		"a code deep in the chain counts":         {fmt.Errorf("dev: %w", &exitError{exitRunning, errors.New("pid 7")}), exitRunning, "inlay: dev: pid 7\n"},
		"a program's own code needs no more text": {&exitError{7, nil}, 7, ""},
		"a wrong command line is 2":               {usageError(errors.New("--for is missing")), exitUsage, "inlay: --for is missing\n"},
		"a signal is 128 and its number":          {childExit(syscall.WaitStatus(syscall.SIGKILL)), 137, ""},
		"a program's code is its own":             {childExit(syscall.WaitStatus(3 << 8)), 3, ""},
		"a program that ended well":               {childExit(0), 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			if code := report(&b, tc.err); code != tc.code || b.String() != tc.text {
				t.Errorf("code %d and %q, want %d and %q", code, b.String(), tc.code, tc.text)
			}
		})
	}
}

// execute runs a command line as main would.
func execute(args ...string) (stdout string, err error) {
	cmd := root()
	var b bytes.Buffer
	cmd.SetOut(&b)
	cmd.SetErr(&b)
	cmd.SetArgs(args)
	err = cmd.Execute()
	return b.String(), err
}

// verbs are all that people see.
func verbs(c *cobra.Command) []*cobra.Command {
	out := []*cobra.Command{c}
	for _, sub := range c.Commands() {
		if !sub.Hidden {
			out = append(out, verbs(sub)...)
		}
	}
	return out
}

// TestHelp: every verb has a long text and examples, and the examples are command lines that are
// taken: the verbs and flags in them exist.
func TestHelp(t *testing.T) {
	for _, c := range verbs(root()) {
		t.Run(c.CommandPath(), func(t *testing.T) {
			if c.Example == "" || c.Short == "" || (c.Long == "" && c.Name() != "version") {
				t.Fatal("no example, no short or no long text")
			}
			if _, err := execute(append(strings.Fields(c.CommandPath())[1:], "--help")...); err != nil {
				t.Errorf("--help: %v", err)
			}
			for line := range strings.Lines(c.Example) {
				words := strings.Fields(line)
				for len(words) > 0 && strings.Contains(words[0], "=") {
					words = words[1:] // the environment of a program
				}
				if len(words) == 0 || words[0] != "inlay" {
					continue
				}
				found, rest, err := root().Find(words[1:])
				if err != nil {
					t.Errorf("%s: %v", line, err)
					continue
				}
				if c.HasParent() && found.Name() != c.Name() {
					t.Errorf("%s: an example of %s", line, found.Name())
				}
				if err := found.ParseFlags(rest); err != nil {
					t.Errorf("%s: %v", line, err)
				}
			}
		})
	}
}

func TestWrongCommandLines(t *testing.T) {
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		args []string
		want string
		code int
	}{
		"an unknown verb, with the nearest":    {[]string{"stauts"}, "did you mean status?", exitUsage},
		"an unknown flag":                      {[]string{"get", "services", "--nope"}, "`inlay get --help`", exitUsage},
		"get of nothing":                       {[]string{"get"}, "want one of services, routes", exitUsage},
		"get of something else":                {[]string{"get", "pods"}, "services, routes, endpoints, clients or certs", exitUsage},
		"a service where none is taken":        {[]string{"get", "clients", "orders"}, "takes no service", exitUsage},
		"a wrong service":                      {[]string{"get", "routes", "Orders"}, `service "Orders"`, exitUsage},
		"a wrong format":                       {[]string{"status", "-o", "xml"}, "want json or yaml", exitUsage},
		"explain of half a call":               {[]string{"explain", "GET"}, "want METHOD URL", exitUsage},
		"explain from nobody":                  {[]string{"explain", "GET", "http://a/"}, "--from is missing", exitUsage},
		"a header without a value":             {[]string{"explain", "GET", "http://a/", "--from", "b", "--header", "x"}, `--header "x": want NAME=VALUE`, exitUsage},
		"a directory that is not there":        {[]string{"validate", dir + "/nope"}, "no such file", exitFailed},
		"compile for nobody":                   {[]string{"compile", dir}, "--for SERVICE and -o FILE", exitUsage},
		"a bootstrap of nobody":                {[]string{"bootstrap"}, "--service is missing", exitUsage},
		"run of no program":                    {[]string{"run", "--service", "a"}, "no program", exitUsage},
		"node for nobody":                      {[]string{"node", "--allow", "me=cart"}, "want UID=SERVICE", exitUsage},
		"a demo of no length":                  {[]string{"demo", "--for", "0s"}, "want more than 0", exitUsage},
		"a flag of the agent without it":       {[]string{"node", "--cgroup", "x"}, "pass --ebpf too", exitUsage},
		"its state without it":                 {[]string{"node", "--state-dir", "/x"}, "pass --ebpf too", exitUsage},
		"a map size that is none":              {[]string{"node", "--ebpf", "--map-size", "peers=many"}, `--map-size "peers=many"`, exitUsage},
		"a map that there is not":              {[]string{"node", "--ebpf", "--map-size", "nosuch=5"}, `"nosuch": no such map: want one of addresses`, exitUsage},
		"the same in dev":                      {[]string{"dev", "--node-address", "10.0.0.1"}, "pass --ebpf too", exitUsage},
		"a node address that is none":          {[]string{"node", "--ebpf", "--node-address", "node1"}, `--node-address "node1"`, exitUsage},
		"a node address that is every one":     {[]string{"node", "--ebpf", "--node-address", "0.0.0.0"}, "other machines reach", exitUsage},
		"a virtual range with bits behind":     {[]string{"dev", "--virtual-ipv4", "10.0.0.1/8"}, "want 10.0.0.0/8", exitUsage},
		"a virtual range of the other family":  {[]string{"controlplane", "--virtual-ipv6", "10.0.0.0/8"}, "family", exitUsage},
		"a virtual range that is none":         {[]string{"controlplane", "--virtual-ipv6", "x"}, "want a range of addresses", exitUsage},
		"breakglass of something else":         {[]string{"node", "breakglass", "maybe"}, "want on, off, or nothing", exitUsage},
		"a verb that node has not":             {[]string{"node", "prob"}, "want no argument", exitUsage},
		"a resolver that is none":              {[]string{"node", "proxy", "--pin", "/x", "--upstream", "dns"}, `--upstream "dns"`, exitUsage},
		"another user's without a cgroup":      {[]string{"run", "--service", "a", "--user", "root", "true"}, "pass --ebpf too", exitUsage},
		"raw sockets without a cgroup":         {[]string{"run", "--service", "a", "--raw", "true"}, "pass --ebpf too", exitUsage},
		"datagrams without a cgroup":           {[]string{"run", "--service", "a", "--port", "53/udp", "true"}, "pass --ebpf too", exitUsage},
		"users of a mesh of one":               {[]string{"dev", "--config", ".", "--allow", "7=*"}, "pass --ebpf too", exitUsage},
		"a demo with programs, of no length":   {[]string{"demo-legacy", "--for", "-1s"}, "want more than 0", exitUsage},
		"nothing runs":                         {[]string{"status", "--run-dir", dir}, "start one with `inlay dev`", exitAbsent},
		"nobody answers where --admin says":    {[]string{"status", "--admin", "127.0.0.1:1"}, "no control plane answers at 127.0.0.1:1", exitAbsent},
		"a program that is not there":          {[]string{"run", "--service", "a", "--run-dir", dir, "no-such-program"}, "no-such-program", 127},
		"a flag of the program, not of inlay":  {[]string{"run", "--service", "a", "--run-dir", dir, "true", "--nope"}, "no node runs here", exitAbsent},
		"a name that the directory has not":    {[]string{"explain", "GET", "http://nowhere/", "--from", "a", "--config", dir}, "no service of that name exists", exitFailed},
		"no arguments where none are taken":    {[]string{"version", "now"}, "want no argument", exitUsage},
		"a snapshot where it cannot be":        {[]string{"compile", dir, "--for", "a", "-o", dir + "/nope/a.inlay"}, "no such file", exitFailed},
		"a configuration that is a plain file": {[]string{"validate", os.Args[0]}, "is a file: want a directory", exitFailed},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := execute(tc.args...)
			var b bytes.Buffer
			if code := report(&b, err); code != tc.code || !strings.Contains(b.String(), tc.want) {
				t.Errorf("code %d and %q, want %d and %q", code, b.String(), tc.code, tc.want)
			}
		})
	}
}

func TestSplitService(t *testing.T) {
	for in, want := range map[string]string{
		"cart": "default/cart", "cart.shop": "shop/cart", "a-1.b-2": "b-2/a-1", strings.Repeat("a", 63): "default/" + strings.Repeat("a", 63),
		"": "", ".": "", "a.": "", ".a": "", "a.b.c": "", "Cart": "", "ca_rt": "", "-a": "", "a-": "", "a/b": "", "ä": "", strings.Repeat("a", 64): "",
	} {
		namespace, name, err := splitService(in)
		got := ""
		if err == nil {
			got = namespace + "/" + name
		}
		if got != want {
			t.Errorf("%q: %q (%v), want %q", in, got, err, want)
		}
		var coded *exitError
		if want == "" && (!errors.As(err, &coded) || coded.code != exitUsage) {
			t.Errorf("%q: %v, want a usage error", in, err)
		}
	}
}

func TestLock(t *testing.T) {
	p, err := placesAt(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	release, err := lock(p.devLock(), holder{PID: 4711, Started: time.Now(), Config: "/etc/mesh"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = lock(p.devLock(), holder{PID: 1})
	var coded *exitError
	if !errors.As(err, &coded) || coded.code != exitRunning {
		t.Errorf("a second one: %v, want exit code %d", err, exitRunning)
	}
	for _, want := range []string{"pid 4711", "/etc/mesh", "kill 4711"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q in it", err, want)
		}
	}
	release()
	again, err := lock(p.devLock(), holder{PID: 2})
	if err != nil {
		t.Fatalf("after the first ended: %v", err)
	}
	again()
}

func TestPlaces(t *testing.T) {
	t.Setenv("HOME", "/home/ada")
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("XDG_DATA_HOME", "")
	at := func(dir string) string { p, err := placesAt(dir); return fmt.Sprint(p.run, err) }
	data := func() string { d, err := defaultData(); return fmt.Sprint(d, err) }
	if got, want := at("")+" "+data(), "/home/ada/.inlay/run<nil> /home/ada/.local/share/inlay<nil>"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	t.Setenv("XDG_DATA_HOME", "/data")
	if got, want := at("")+" "+data(), "/run/user/7/inlay<nil> /data/inlay<nil>"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := at("/x"); got != "/x<nil>" {
		t.Errorf("%s, want what was asked for", got)
	}
	// A verb that asks takes the user's own mesh where one runs.
	own := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", own)
	if err := os.MkdirAll(own+"/inlay", 0o755); err != nil {
		t.Fatal(err)
	}
	if p, err := placesOf(""); err != nil || p.inUse() && p.run != systemRun || !p.inUse() && p.run != own+"/inlay" {
		t.Errorf("nothing runs: %v, %v", p, err)
	}
	if err := os.WriteFile(own+"/inlay/node.sock", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := placesOf(""); err != nil || p.run != own+"/inlay" {
		t.Errorf("its own runs: %v, %v", p, err)
	}
	if p, err := placesFor("", true); err != nil || p.run != systemRun {
		t.Errorf("with --ebpf: %v, %v", p, err)
	}
	if p, err := placesFor("/x", true); err != nil || p.run != "/x" {
		t.Errorf("with --ebpf and a directory: %v, %v", p, err)
	}
	if p, err := placesAt("/x"); err != nil || p.flowsSocket() != "/x/"+ebpf.FlowsSocket || p.proxySocket() != "/x/"+ebpf.ProxySocket {
		t.Errorf("sockets of the agent: %v, %v", p, err)
	}
}

// TestLastWords: what a daemon logs passes at once, line by line; its last words are kept for who
// started it, however the writes cut them.
func TestLastWords(t *testing.T) {
	const log = "time=1 level=WARN msg=x\npanic: inlay: no\n"
	const words = "inlay: listen 127.0.0.1:1: taken\nand another fault\n"
	for cut := range len(log + words) {
		var passed bytes.Buffer
		l := last{to: &passed}
		for _, part := range []string{(log + words)[:cut], (log + words)[cut:]} {
			if n, err := l.Write([]byte(part)); n != len(part) || err != nil {
				t.Fatalf("cut at %d: wrote %d: %v", cut, n, err)
			}
		}
		if got, want := l.words(), "listen 127.0.0.1:1: taken\nand another fault"; got != want {
			t.Errorf("cut at %d: last words %q, want %q", cut, got, want)
		}
		if passed.String() != log {
			t.Errorf("cut at %d: passed %q, want %q", cut, passed.String(), log)
		}
	}
	var passed bytes.Buffer
	l := last{to: &passed}
	_, _ = l.Write([]byte("half a line"))
	if got := l.words(); got != "" || passed.String() != "half a line\n" {
		t.Errorf("words %q, passed %q", got, passed.String())
	}
}

func TestSuggest(t *testing.T) {
	q := question{namespace: "shop", service: "web"}
	known := []string{q.nameOf("shop", "orders"), q.nameOf("default", "orders"), q.nameOf("shop", "cart")}
	for url, want := range map[string]string{
		"http://ordes/v1":         `no; did you mean "orders"?`,
		"http://order.default:80": `no; did you mean "orders.default"?`,
		"http://orders/":          "no",
		"http://something/":       "no",
		"http://ca rt/":           "no",
	} {
		q.url = url
		if got := q.suggest(errors.New("no"), known).Error(); got != want {
			t.Errorf("%s: %q, want %q", url, got, want)
		}
	}
}
