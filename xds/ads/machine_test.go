package ads_test

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/xds/ads"
	"github.com/inlay-mesh/inlay/xds/resource"
)

var update = flag.Bool("update", false, "rewrite the conversations in testdata")

// short are the words of the conversations for the type URLs.
var short = map[string]string{"LDS": resource.ListenerType, "RDS": resource.RouteType, "CDS": resource.ClusterType, "EDS": resource.EndpointsType}

func word(typeURL string) string {
	for k, v := range short {
		if v == typeURL {
			return k
		}
	}
	return typeURL
}

// TestConversations plays each section of testdata/*.txtar against a new machine: a line that
// starts with "> " is an event, the lines below it are what the machine wants done.
//
//	> subscribe TYPE NAME [cached VERSION]   > unsubscribe TYPE NAME   > forget
//	> subscribe-all TYPE [NAME[@VERSION] (held)]   > unsubscribe-all TYPE
//	> connect delta|sotw   > disconnect   > flush   > timeout TYPE NAME   > due TYPE
//	> response TYPE nonce=N [version=V] [NAME@VERSION] [!NAME (rejected)] [!? (rejected, name unknown)] [-NAME (removed)]
func TestConversations(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no conversations: %v", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		var m *ads.Machine
		lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
		for i, line := range lines {
			switch {
			case strings.HasPrefix(line, "-- "):
				m = ads.NewMachine()
				out = append(out, line)
			case m == nil, line == "", strings.HasPrefix(line, "#"):
				out = append(out, line)
			case strings.HasPrefix(line, "> "):
				e, err := event(strings.Fields(line[2:]))
				if err != nil {
					t.Fatalf("%s:%d: %v", file, i+1, err)
				}
				out = append(out, line)
				for _, a := range m.Step(e) {
					out = append(out, "  "+text(a))
				}
			}
		}
		if *update {
			if err := os.WriteFile(file, []byte(strings.Join(out, "\n")+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		for i := range max(len(lines), len(out)) {
			got, want := at(out, i), at(lines, i)
			if got != want {
				t.Errorf("%s:%d: the machine wants\n%s\nthe conversation says\n%s", file, i+1, got, want)
				break
			}
		}
	}
}

func at(s []string, i int) string {
	if i < len(s) {
		return s[i]
	}
	return "(end)"
}

func event(w []string) (ads.Event, error) {
	name := func() ads.Name { return ads.Name{Type: short[at(w, 1)], Name: at(w, 2)} }
	switch w[0] {
	case "subscribe":
		if at(w, 3) == "cached" {
			return ads.Subscribe{Name: name(), Known: true, Version: at(w, 4)}, nil
		}
		return ads.Subscribe{Name: name()}, nil
	case "subscribe-all":
		e := ads.SubscribeAll{Type: short[at(w, 1)], Held: map[string]string{}}
		for _, f := range w[2:] {
			n, v, _ := strings.Cut(f, "@")
			e.Held[n] = v
		}
		return e, nil
	case "unsubscribe-all":
		return ads.UnsubscribeAll{Type: short[at(w, 1)]}, nil
	case "unsubscribe":
		return ads.Unsubscribe{Name: name()}, nil
	case "forget":
		return ads.Forget{}, nil
	case "connect":
		if at(w, 1) == "sotw" {
			return ads.Connected{Mode: ads.SotW}, nil
		}
		return ads.Connected{Mode: ads.Delta}, nil
	case "disconnect":
		return ads.Disconnected{}, nil
	case "flush":
		return ads.Flush{}, nil
	case "timeout":
		return ads.TimedOut{Name: name()}, nil
	case "due":
		return ads.Due{Type: short[at(w, 1)]}, nil
	case "response":
		r := ads.Response{Type: short[at(w, 1)]}
		for _, f := range w[2:] {
			switch {
			case strings.HasPrefix(f, "nonce="):
				r.Nonce = f[len("nonce="):]
			case strings.HasPrefix(f, "version="):
				r.Version = f[len("version="):]
			case f == "!?":
				r.Resources = append(r.Resources, ads.Received{Err: errors.New("no name")})
			case f[0] == '!':
				r.Resources = append(r.Resources, ads.Received{Name: f[1:], Err: fmt.Errorf("%s is bad", f[1:])})
			case f[0] == '-':
				r.Removed = append(r.Removed, f[1:])
			default:
				n, v, _ := strings.Cut(f, "@")
				r.Resources = append(r.Resources, ads.Received{Name: n, Version: v})
			}
		}
		return r, nil
	}
	return nil, fmt.Errorf("unknown event %q", w[0])
}

func text(a ads.Action) string {
	var b strings.Builder
	add := func(format string, args ...any) { fmt.Fprintf(&b, " "+format, args...) }
	switch a := a.(type) {
	case ads.Send:
		fmt.Fprintf(&b, "send %s %s", a.Mode, word(a.Type))
		if a.First {
			add("node")
		}
		if a.Mode == ads.SotW {
			add("names=%s version=%q", strings.Join(a.Names, ","), a.Version)
		}
		if len(a.Request.Subscribe) > 0 {
			add("subscribe=%s", strings.Join(a.Request.Subscribe, ","))
		}
		if len(a.Request.Unsubscribe) > 0 {
			add("unsubscribe=%s", strings.Join(a.Request.Unsubscribe, ","))
		}
		for _, n := range slices.Sorted(maps.Keys(a.InitialVersions)) {
			add("initial:%s@%s", n, a.InitialVersions[n])
		}
		if a.Nonce != "" {
			add("nonce=%s", a.Nonce)
		}
		if a.Error != "" {
			add("NACK %q", a.Error)
		}
	case ads.Deliver:
		fmt.Fprintf(&b, "deliver %s %s", word(a.Type), a.Update.Name.Name)
		switch {
		case a.NotExist:
			add("does not exist")
		case a.Synced:
			add("synced")
		case a.Err != nil:
			add("rejected: %v", a.Err)
		default:
			add("version=%q", a.Version)
		}
	case ads.StartTimer:
		fmt.Fprintf(&b, "start timer %s %s", word(a.Type), a.Name.Name)
	case ads.StopTimer:
		fmt.Fprintf(&b, "stop timer %s %s", word(a.Type), a.Name.Name)
	case ads.Hold:
		fmt.Fprintf(&b, "hold %s again=%d", word(a.Type), a.Again)
	case ads.EndHold:
		fmt.Fprintf(&b, "end hold %s", word(a.Type))
	}
	return b.String()
}
