// Command standalone calls a service of the mesh without a control plane: its configuration is a
// file that was compiled before. It prints the answer and why the call went where it went.
//
//	inlay compile ./standalone/mesh --for me -o me.inlay
//	python3 -m http.server --bind 127.0.0.1 9001 &
//	INLAY_CONFIG=me.inlay go run ./standalone http://files/
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"

	"github.com/inlay-mesh/inlay/meshsdk"
)

func main() {
	ctx := context.Background()
	m, err := meshsdk.Open(ctx, meshsdk.WithService("me"))
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	ctx = meshsdk.WithCallTrace(ctx, &meshsdk.CallTrace{Done: func(d *meshsdk.Decision) {
		fmt.Printf("route %s (%s) to cluster %s: %s\n", d.Route.Object, d.Route.Source, d.Cluster, d.Reason)
	}})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, os.Args[1], nil)
	if err != nil {
		log.Fatal(err)
	}
	resp, err := m.HTTPClient().Do(req)
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	n, err := io.Copy(os.Stdout, resp.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, %d bytes\n", resp.Status, n)
}
