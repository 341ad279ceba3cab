package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/xds/bootstrap"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
)

func bootstrapCommand() *cobra.Command {
	var t target
	var service, out, server, id string
	cmd := &cobra.Command{
		Use:   "bootstrap --service NAME [-o FILE]",
		Short: "Write the bootstrap of a stock gRPC client or server",
		Long: `Write the gRPC bootstrap JSON of a program that speaks xDS without the SDK, in any language. Point
GRPC_XDS_BOOTSTRAP at it and dial xds:///SERVICE. It uses the plaintext port of the control plane,
which is on loopback and for development only; such a client is served permissive services.`,
		Example: "  inlay bootstrap --service cart -o cart.json\n  GRPC_XDS_BOOTSTRAP=cart.json python3 cart.py",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if service == "" {
				return usageError(errors.New("--service is missing: which service is the program?"))
			}
			namespace, name, err := splitService(service)
			if err != nil {
				return err
			}
			if server == "" {
				s, err := ask(c.Context(), &t, &adminpb.GetStatusRequest{}, adminconnect.AdminClient.GetStatus)
				if err != nil {
					return err
				}
				if server = s.Addresses["xds"]; server == "" {
					return errors.New("the control plane has no plaintext xDS port: start it with --xds-addr 127.0.0.1:15010, or name one with --server")
				}
			}
			if id == "" {
				host, err := os.Hostname()
				if err != nil {
					return fmt.Errorf("host name: %w; pass --node-id", err)
				}
				id = fmt.Sprintf("%s.%s@%s", name, namespace, host)
			}
			raw, err := bootstrap.Generate(bootstrap.Client{ServerURI: server, NodeID: id, Service: name, Namespace: namespace})
			if err != nil {
				return err
			}
			if out == "" || out == "-" {
				_, err = c.OutOrStdout().Write(raw)
				return err
			}
			return writeFile(out, raw)
		},
	}
	t.flags(cmd)
	cmd.Flags().StringVar(&service, "service", "", "NAME or NAME.NAMESPACE of the program's service")
	cmd.Flags().StringVarP(&out, "output", "o", "", "file to write; - or nothing is stdout")
	cmd.Flags().StringVar(&server, "server", "", "host:port of the xDS server (default: asked of the control plane)")
	cmd.Flags().StringVar(&id, "node-id", "", "node id (default SERVICE.NAMESPACE@HOST)")
	return cmd
}
