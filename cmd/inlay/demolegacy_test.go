package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// TestDemoLegacy runs the whole: a control plane, a node with its agent, curl and Python in the mesh,
// on the real kernel; and nothing is left of it.
func TestDemoLegacy(t *testing.T) {
	err := load.Check()
	needs(t, err == nil, fmt.Sprint(err))
	for _, tool := range []string{"python3", "curl"} {
		_, err := findTools(tool)
		needs(t, err == nil, fmt.Sprint(err))
	}
	cmd := exec.Command("/proc/self/exe", "demo-legacy", "--for", "2s", "-o", "json")
	cmd.Env = append(os.Environ(), verbVariable+"=1", "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, stdout.Bytes(), stderr.Bytes())
	}
	var s legacySummary
	d := json.NewDecoder(&stdout)
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", s)
	if s.Calls == 0 || s.Failed != 0 || s.Denied == 0 || s.Lost != 0 || s.Flows < s.Denied {
		t.Errorf("summary %+v: want calls, none failed, some denied, a flow for each denied one, none lost", s)
	}
	if strings.Contains(stderr.String(), "DATA RACE") {
		t.Errorf("the race detector reported:\n%s", stderr.String())
	}
	mnt, err := load.FindCgroup2()
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("inlay-demo-%d", cmd.Process.Pid)
	for _, path := range []string{filepath.Join(mnt, name), filepath.Join(load.BPFFS, "inlay-"+name)} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

// What is not as promised fails the demo, with each thing named.
func TestLegacyConclusion(t *testing.T) {
	good := legacySummary{Calls: 9, Denied: 2, Flows: 20}
	denied := &nodepb.Flow{Verdict: "denied", Policy: "default/visitors", Rule: "not-to-legacy", Source: "demo.yaml:22"}
	for name, tc := range map[string]struct {
		s    legacySummary
		sdk  uint64
		flow *nodepb.Flow
		want string // of the error; empty: none
	}{
		"as promised":                         {good, 4, denied, ""},
		"a call failed":                       {legacySummary{Calls: 9, Failed: 1, Denied: 2}, 4, denied, "1 calls failed"},
		"the SDK was silent":                  {good, 0, denied, "the SDK made no call"},
		"curl was silent":                     {good, 9, denied, "curl made no call"},
		"nothing was denied":                  {legacySummary{Calls: 9}, 4, denied, "no call was denied"},
		"a refusal without its policy":        {good, 4, nil, "names its policy"},
		"a flow that was denied by no rule":   {good, 4, &nodepb.Flow{Verdict: "denied"}, "names its policy"},
		"an allowed flow is none of a rule":   {good, 4, &nodepb.Flow{Verdict: "allowed", Source: "demo.yaml:22"}, "names its policy"},
		"several things, all of them at once": {legacySummary{Failed: 3}, 0, nil, "3 calls failed, or were allowed and should not be; the SDK"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			d := &legacyDemo{out: formatTable, stdout: &out}
			seen := newFlowCount()
			if tc.flow != nil {
				seen.add(tc.flow)
			}
			err := d.conclude(tc.s, tc.sdk, seen)
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if tc.want == "" && !strings.Contains(out.String(), "denied by default/visitors, rule not-to-legacy, demo.yaml:22") {
				t.Errorf("printed %q", out.String())
			}
		})
	}
}

func TestLineFilter(t *testing.T) {
	const text = "keep\ndrop this\nkeep too\n"
	for cut := range len(text) {
		var out bytes.Buffer
		f := &lineFilter{to: &out, drop: []byte("drop")}
		for _, part := range []string{text[:cut], text[cut:]} {
			if n, err := f.Write([]byte(part)); n != len(part) || err != nil {
				t.Fatalf("cut at %d: %d, %v", cut, n, err)
			}
		}
		if out.String() != "keep\nkeep too\n" {
			t.Errorf("cut at %d: %q", cut, out.String())
		}
	}
}
