package ebpf

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestJudge(t *testing.T) {
	const root = "/sys/fs/cgroup/inlay"
	known := map[string]*workload{
		"r1": {Admission: Admission{RunID: "r1", Namespace: "default", Service: "billing", UID: 1000, Cgroup: root + "/billing.default-r1"}, labels: map[string]string{"a": "b"}},
		"r2": {Admission: Admission{RunID: "r2", Namespace: "shop", Service: "orders", UID: 1000, Cgroup: root + "/orders.shop-r2"}},
	}
	mine := Admission{RunID: "r1", Namespace: "default", Service: "billing", UID: 1000, Labels: map[string]string{"a": "b"}}
	for name, tc := range map[string]struct {
		change func(*Admission)
		gone   bool
		want   string // part of the error; empty: admitted
	}{
		"a new run gets a cgroup":                  {change: func(a *Admission) { a.RunID = "r3" }},
		"a run that asks again gets its own":       {change: func(*Admission) {}},
		"a reconnection gets its own":              {change: func(a *Admission) { a.Cgroup = root + "/billing.default-r1" }},
		"the cgroup of another run":                {change: func(a *Admission) { a.Cgroup = root + "/orders.shop-r2" }, want: "another's"},
		"another's cgroup under an unknown run id": {change: func(a *Admission) { a.RunID, a.Cgroup = "r3", root+"/billing.default-r1" }, want: "another's"},
		"a cgroup that nobody was given":           {change: func(a *Admission) { a.RunID, a.Cgroup = "r3", root+"/x" }, want: "unknown"},
		"own run id, a cgroup of nobody":           {change: func(a *Admission) { a.Cgroup = root + "/x" }, want: "was given"},
		"outside the managed root":                 {change: func(a *Admission) { a.Cgroup = "/sys/fs/cgroup/system.slice" }, want: "outside the managed root"},
		"the root itself":                          {change: func(a *Admission) { a.Cgroup = root }, want: "outside the managed root"},
		"below a leaf":                             {change: func(a *Admission) { a.Cgroup = root + "/billing.default-r1/x" }, want: "outside the managed root"},
		"out by dots":                              {change: func(a *Admission) { a.Cgroup = root + "/../inlay/billing.default-r1" }, want: "outside the managed root"},
		"a relative path":                          {change: func(a *Admission) { a.Cgroup = "inlay/billing.default-r1" }, want: "outside the managed root"},
		"a cgroup that is gone":                    {change: func(a *Admission) { a.Cgroup = root + "/billing.default-r1" }, gone: true, want: "is gone"},
		"another service under the run id":         {change: func(a *Admission) { a.Service = "orders" }, want: "keeps its service"},
		"another user under the run id":            {change: func(a *Admission) { a.UID = 0 }, want: "keeps its user"},
		"other labels under the run id":            {change: func(a *Admission) { a.Labels = nil }, want: "keeps its labels"},
		"raw sockets that were not granted":        {change: func(a *Admission) { a.Raw = true }, want: "raw sockets"},
	} {
		t.Run(name, func(t *testing.T) {
			in := mine
			tc.change(&in)
			labels, err := in.check()
			if err != nil {
				t.Fatal(err)
			}
			before := maps.Clone(known)
			w, err := judge(known, root, in, labels, func(string) bool { return !tc.gone })
			if !reflect.DeepEqual(before, known) {
				t.Error("a decision changed the state")
			}
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tc.want == "" && (w.RunID != in.RunID || w.Cgroup != root+"/"+in.leaf()):
				t.Errorf("workload %+v", w)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("%v, want an error with %q", err, tc.want)
			}
		})
	}
}

func TestWordsOfAnAdmission(t *testing.T) {
	for name, tc := range map[string]struct {
		in   Admission
		want string
	}{
		"run id with a slash":     {Admission{RunID: "../x", Namespace: "n", Service: "s"}, "run id"},
		"run id with a dot":       {Admission{RunID: "a.b", Namespace: "n", Service: "s"}, "run id"},
		"empty run id":            {Admission{Namespace: "n", Service: "s"}, "run id"},
		"long run id":             {Admission{RunID: strings.Repeat("a", 65), Namespace: "n", Service: "s"}, "run id"},
		"service with a slash":    {Admission{RunID: "r", Namespace: "n", Service: "s/../.."}, "s/../.."},
		"empty namespace":         {Admission{RunID: "r", Service: "s"}, "namespace"},
		"two versions":            {Admission{RunID: "r", Namespace: "n", Service: "s", Version: "1", Labels: map[string]string{"version": "2"}}, "version"},
		"both run id and service": {Admission{RunID: "/", Namespace: "n", Service: ""}, "run id"},
	} {
		if _, err := tc.in.check(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, tc.want)
		}
	}
}

func TestWhenAnEmptyCgroupGoes(t *testing.T) {
	now := time.Unix(1000, 0)
	for name, tc := range map[string]struct {
		w       workload
		started time.Duration // ago
		want    bool
	}{
		"claimed":                            {workload{claimed: true}, time.Hour, false},
		"claimed and left":                   {workload{claimed: true, left: true}, 0, true},
		"of an agent before, just started":   {workload{}, 0, false},
		"of an agent before, nobody came":    {workload{}, claimWait, true},
		"of an agent before, that was told ": {workload{left: true}, 0, true},
	} {
		if got := tc.w.over(now, now.Add(-tc.started)); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

func TestStateFileRefusals(t *testing.T) {
	const root = "/r"
	good := `{"format":"inlay-workloads","version":1,"root":"/r","workloads":[{"runId":"a","namespace":"n","service":"s","uid":1,"cgroup":"/r/s.n-a","admitted":"2026-01-01T00:00:00Z"}]}`
	if w, err := decodeState([]byte(good), root); err != nil || len(w) != 1 {
		t.Fatalf("good: %v, %v", w, err)
	}
	for name, tc := range map[string]struct{ old, new, want string }{
		"another file":      {"inlay-workloads", "else", "not a list"},
		"damaged":           {"{", "", "damaged"},
		"newer":             {`"version":1`, `"version":2`, "newer"},
		"version 0":         {`"version":1`, `"version":0`, "want 1"},
		"another root":      {`"root":"/r"`, `"root":"/q"`, "--cgroup /q"},
		"another's cgroup":  {"/r/s.n-a", "/etc", "want /r/s.n-a"},
		"a bad name":        {`"service":"s"`, `"service":"../s"`, "workload 0"},
		"the same run id":   {`}]}`, `},{"runId":"a","namespace":"n","service":"s","cgroup":"/r/s.n-a"}]}`, "twice"},
		"a negative number": {`"uid":1`, `"uid":-1`, "damaged"},
	} {
		if _, err := decodeState([]byte(strings.Replace(good, tc.old, tc.new, 1)), root); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, tc.want)
		}
	}
}

func FuzzState(f *testing.F) {
	f.Add([]byte(`{"format":"inlay-workloads","version":1,"root":"/r","workloads":[{"runId":"a","namespace":"n","service":"s","labels":{"k":"v"},"uid":1,"cgroup":"/r/s.n-a","admitted":"2026-01-01T00:00:00Z","left":true}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		w, err := decodeState(b, "/r")
		if err != nil {
			return
		}
		out, err := encodeState("/r", w)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decodeState(out, "/r")
		if err != nil {
			t.Fatalf("what was written is refused: %v\n%s", err, out)
		}
		if out2, err := encodeState("/r", again); err != nil || !bytes.Equal(out, out2) {
			t.Fatalf("%v\n%s\n%s", err, out, out2)
		}
	})
}

func FuzzCgroupOfProcess(f *testing.F) {
	for _, s := range []string{"0::/inlay/a.b-c\n", "1:name=systemd:/x\n0::/\n", "0::/../x\n", "0::/a (deleted)\n", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		path, err := unified(strings.NewReader(s))
		if err != nil {
			return
		}
		if leaf, ok := leafOf("/r/inlay", "/r"+path); ok && (!strings.HasPrefix(leaf, "/r/inlay/") || strings.Count(leaf, "/") > 3) {
			t.Errorf("%q: leaf %q", s, leaf)
		}
	})
}

// An agent that is killed while it writes leaves one file at most, and the next takes it.
func TestStateFileLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, workloadsFile)
	if err := os.WriteFile(path+".new", []byte("a longer text than what is written next, cut short"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"one", "two"} {
		if err := replaceFile(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(path); err != nil || string(b) != text {
			t.Errorf("%q, %v: want %q", b, err, text)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("files %v, %v: want one", left, err)
	}
}
