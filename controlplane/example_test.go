package controlplane_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/inlay-mesh/inlay/controlplane"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

// A control plane within one process: nothing on disk, configuration by Apply.
func ExampleNew() {
	ctx := context.Background()
	cp, err := controlplane.New(controlplane.Config{Admin: "127.0.0.1:0"})
	if err != nil {
		fmt.Println(err)
		return
	}
	if err := cp.Start(ctx); err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = cp.Stop(ctx) }()

	service := `
apiVersion: inlay.dev/v1alpha1
kind: MeshService
metadata: {name: orders}
spec:
  ports: [{port: 8080, protocol: GRPC}]
  endpoints: [{address: 127.0.0.1, port: 9001}]
`
	applied, err := cp.Apply(ctx, []source.File{{Path: "mesh.yaml", Data: []byte(service)}})
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, w := range applied.Warnings { // the service is strict, its endpoint speaks no mesh TLS
		fmt.Println("warning", w.Code)
	}

	_, err = cp.Apply(ctx, []source.File{{Path: "mesh.yaml", Data: []byte("kind: Nonsense")}})
	var refused *controlplane.RefusedError
	if errors.As(err, &refused) {
		fmt.Println("fault", refused.Faults[0].Code, "and the revision before stays")
	}
	// Output:
	// warning INL2002
	// fault INL1004 and the revision before stays
}
