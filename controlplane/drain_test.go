package controlplane

import (
	"fmt"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/controlplane/source"
	"github.com/inlay-mesh/inlay/xds/meshpb/registrypb"
)

// An instance that leaves right after it came: when it is told that everybody let go of it, no mesh
// that holds it is published any more, also not by a build that had seen it and takes its time.
func TestDrainedMeansThatNoBuildUnderWayBringsItBack(t *testing.T) {
	p := launch(t, func(c *Config) { c.ConfigDir, c.DataDir = "", "" })
	p.ready()
	var many strings.Builder
	for i := range 200 { // so that a build takes longer than two messages
		many.WriteString(strings.ReplaceAll(permissive, "orders", fmt.Sprint("s", i)) + "---\n")
	}
	files := []source.File{{Path: "mesh.yaml", Data: []byte(many.String())}}
	if _, err := p.Apply(t.Context(), files); err != nil {
		t.Fatal(err)
	}
	conn := p.mtls("orders")
	for round := range 5 {
		id := fmt.Sprint("i-", round)
		s := enrol(t, conn, sdkInstance(id, "orders", "10.0.0.1:7000"))
		if err := s.Send(&registrypb.RegisterRequest{Kind: &registrypb.RegisterRequest_Drain{Drain: &registrypb.Drain{}}}); err != nil {
			t.Fatal(err)
		}
		resp, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if !resp.GetDrained().GetAll() {
			t.Fatalf("round %d: %v, want drained by all: nobody follows", round, resp)
		}
		settled := make(chan error, 1)
		go func() { // what is applied is served after every build before it
			_, err := p.Apply(t.Context(), files)
			settled <- err
		}()
		for over := false; !over; {
			changed := p.Server().Changed()
			if p.Server().Views().Healthy(id) {
				t.Fatalf("round %d: %s is drained, and published as healthy", round, id)
			}
			select {
			case <-changed:
			case err := <-settled:
				if err != nil {
					t.Fatal(err)
				}
				over = true
			}
		}
	}
}
