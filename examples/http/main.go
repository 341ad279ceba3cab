// Command http is a net/http service and its caller in one program: `http serve` and `http call`.
//
//	inlay run --service greeter -- go run ./http serve
//	inlay run --service me -- go run ./http call World
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

func hello(w http.ResponseWriter, r *http.Request) {
	caller, _ := meshsdk.PeerFromContext(r.Context())
	fmt.Fprintf(w, "Hello %s, you are %s\n", r.PathValue("name"), caller)
}

func main() {
	ctx := context.Background()
	m, err := meshsdk.Open(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		mux := http.NewServeMux()
		mux.HandleFunc("GET /hello/{name}", hello)
		if err := m.Run(ctx, meshsdk.HTTP(8080, mux)); err != nil {
			log.Fatal(err)
		}
		return
	}
	resp, err := m.HTTPClient().Get("http://greeter/hello/" + os.Args[len(os.Args)-1])
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Print(string(text))
}
