package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
	"github.com/inlay-mesh/inlay/xds"
)

func compileCommand() *cobra.Command {
	var service, out, trustDomain string
	cmd := &cobra.Command{
		Use:   "compile DIR --for SERVICE -o FILE",
		Short: "Write what one service needs of a mesh to a file",
		Long: `Compile a directory of YAML for one service and write it in the format of the SDK's cache. A program
with INLAY_CONFIG=FILE runs from it without a control plane; endpoints are the static ones.`,
		Example: "  inlay compile ./mesh --for cart -o cart.inlay\n  INLAY_CONFIG=cart.inlay ./cart",
		Args:    exactly("DIR"),
		RunE: func(c *cobra.Command, args []string) error {
			if service == "" || out == "" {
				return usageError(errors.New("--for SERVICE and -o FILE are both needed"))
			}
			namespace, name, err := splitService(service)
			if err != nil {
				return err
			}
			m, findings, err := compileDir(args[0], trustDomain)
			if err != nil {
				return err
			}
			printFindings(c.ErrOrStderr(), findings)
			if err := faultsError(args[0], findings); err != nil {
				return err
			}
			raw, n, err := snapshotOf(m, namespace, name)
			if err != nil {
				return err
			}
			if err := writeFile(out, raw); err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "%s: revision %s for %s.%s, %d resources, %d bytes\n", out, m.Revision, name, namespace, n, len(raw))
			return nil
		},
	}
	cmd.Flags().StringVar(&service, "for", "", "service that will read the file: NAME or NAME.NAMESPACE")
	cmd.Flags().StringVarP(&out, "output", "o", "", "file to write")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "inlay.local", "SPIFFE trust domain")
	return cmd
}

// snapshotOf encodes everything that the SDK of one service may ask for.
func snapshotOf(m *ir.Mesh, namespace, service string) (raw []byte, resources int, err error) {
	set, err := xdsgen.Generate(m, xdsgen.View{Kind: xdsgen.SDK, Namespace: namespace, Service: service})
	if err != nil {
		return nil, 0, err
	}
	var all []xds.RawResource
	for _, byName := range set.Resources {
		for _, r := range byName {
			all = append(all, rawResource(r))
		}
	}
	return xds.EncodeSnapshot(all, snapshotMeta(m, namespace, service)), len(all), nil
}

func rawResource(r *xdsgen.Resource) xds.RawResource {
	return xds.RawResource{Type: r.Type, Name: r.Name, Version: r.Version, Bytes: r.Any.Value}
}

func snapshotMeta(m *ir.Mesh, namespace, service string) xds.Meta {
	meta := xds.Meta{
		TrustDomain: m.TrustDomain, Revision: m.Revision, Written: time.Now(),
		SPIFFEID: fmt.Sprintf("spiffe://%s/ns/%s/svc/%s", m.TrustDomain, namespace, service),
	}
	seen := map[string]bool{}
	for _, s := range m.Services {
		if !seen[s.Namespace] {
			seen[s.Namespace] = true
			meta.Namespaces = append(meta.Namespaces, s.Namespace)
		}
	}
	return meta
}

// writeFile writes by rename, so that a reader never sees half of it.
func writeFile(path string, raw []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".inlay-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(raw)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
