// Command plain is the gRPC example on plain grpc-go, net/http and the OTel API: what a program
// links that does by hand what the SDK does for it. size_test.go compares the two.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"

	"go.opentelemetry.io/otel"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/inlay-mesh/inlay/examples/hellopb"
)

type greeter struct {
	hellopb.UnimplementedGreeterServer
}

func (greeter) Hello(ctx context.Context, r *hellopb.HelloRequest) (*hellopb.HelloReply, error) {
	_, span := otel.Tracer("plain").Start(ctx, "hello")
	defer span.End()
	return &hellopb.HelloReply{Text: fmt.Sprintf("Hello %s", r.Name)}, nil
}

func main() {
	cert, err := tls.LoadX509KeyPair("cert.pem", "key.pem")
	if err != nil {
		log.Fatal(err)
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		log.Fatal(err)
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, MinVersion: tls.VersionTLS13}
	if len(os.Args) > 1 && os.Args[1] == "serve" {
		go func() {
			log.Fatal((&http.Server{Addr: ":8081", Handler: http.NotFoundHandler()}).ListenAndServeTLS("", ""))
		}()
		lis, err := net.Listen("tcp", ":8080")
		if err != nil {
			log.Fatal(err)
		}
		s := grpc.NewServer(grpc.Creds(credentials.NewTLS(cfg)))
		hellopb.RegisterGreeterServer(s, greeter{})
		log.Fatal(s.Serve(lis))
	}
	if _, err := http.Get("https://greeter/"); err != nil {
		log.Print(err)
	}
	conn, err := grpc.NewClient("greeter", grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		log.Fatal(err)
	}
	reply, err := hellopb.NewGreeterClient(conn).Hello(context.Background(), &hellopb.HelloRequest{Name: os.Args[len(os.Args)-1]})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(reply.Text)
}
