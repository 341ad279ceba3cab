package inlay_test

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "github.com/inlay-mesh/inlay/identity/workloadpb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/capb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/extpb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
	_ "github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

var update = flag.Bool("update", false, "write proto/wire.lock anew")

const lockFile = "proto/wire.lock"

// TestWireOnlyGrows compares the messages and services of Inlay with proto/wire.lock: what stands
// there may not change or go away, since older programs speak it; what is new must be written down
// (go test -run TestWireOnlyGrows -update .).
func TestWireOnlyGrows(t *testing.T) {
	now := wireLines()
	if *update {
		if err := os.WriteFile(lockFile, []byte(strings.Join(now, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(lockFile)
	if err != nil {
		t.Fatal(err)
	}
	locked := strings.Split(strings.TrimSpace(string(raw)), "\n")
	for _, line := range locked {
		if !slices.Contains(now, line) {
			t.Errorf("breaks the wire: %q is gone or changed", line)
		}
	}
	for _, line := range now {
		if !slices.Contains(locked, line) {
			t.Errorf("not in %s: %q; add it with -update", lockFile, line)
		}
	}
}

// wireLines has one line for each field, enum value and method of our own packages, sorted.
func wireLines() []string {
	var lines []string
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if !strings.HasPrefix(f.Path(), "inlay/") || strings.HasPrefix(f.Path(), "inlay/xds/") {
			return true // the trimmed xDS copies follow their originals
		}
		for i := range f.Messages().Len() {
			lines = append(lines, messageLines(f.Messages().Get(i))...)
		}
		for i := range f.Enums().Len() {
			e := f.Enums().Get(i)
			for j := range e.Values().Len() {
				lines = append(lines, fmt.Sprintf("%s %d %s", e.FullName(), e.Values().Get(j).Number(), e.Values().Get(j).Name()))
			}
		}
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				lines = append(lines, fmt.Sprintf("%s %s %v -> %s %v", m.FullName(), m.Input().FullName(), m.IsStreamingClient(), m.Output().FullName(), m.IsStreamingServer()))
			}
		}
		return true
	})
	slices.Sort(lines)
	return lines
}

func messageLines(m protoreflect.MessageDescriptor) []string {
	var lines []string
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		kind := f.Kind().String()
		if f.Message() != nil {
			kind = string(f.Message().FullName())
		} else if f.Enum() != nil {
			kind = string(f.Enum().FullName())
		}
		lines = append(lines, fmt.Sprintf("%s %d %s %s %s", m.FullName(), f.Number(), f.Name(), f.Cardinality(), kind))
	}
	for i := range m.Messages().Len() {
		lines = append(lines, messageLines(m.Messages().Get(i))...)
	}
	return lines
}
