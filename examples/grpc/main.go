// Command grpc is a gRPC service and its caller in one program: `grpc serve` and `grpc call NAME`.
//
//	inlay run --service greeter -- go run ./grpc serve
//	inlay run --service me -- go run ./grpc call World
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/inlay-mesh/inlay/examples/hellopb"
	"github.com/inlay-mesh/inlay/meshsdk"
)

type greeter struct {
	hellopb.UnimplementedGreeterServer
}

func (greeter) Hello(ctx context.Context, r *hellopb.HelloRequest) (*hellopb.HelloReply, error) {
	caller, _ := meshsdk.PeerFromContext(ctx)
	return &hellopb.HelloReply{Text: fmt.Sprintf("Hello %s, you are %s", r.Name, caller)}, nil
}

func main() {
	ctx := context.Background()
	m, err := meshsdk.Open(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		s := m.NewServer()
		hellopb.RegisterGreeterServer(s, greeter{})
		if err := m.Run(ctx, meshsdk.GRPC(8080, s)); err != nil {
			log.Fatal(err)
		}
		return
	}
	conn, err := m.NewClient("greeter") // a real *grpc.ClientConn
	if err != nil {
		log.Fatal(err)
	}
	reply, err := hellopb.NewGreeterClient(conn).Hello(ctx, &hellopb.HelloRequest{Name: os.Args[len(os.Args)-1]})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(reply.Text)
}
