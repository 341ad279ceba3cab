package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
)

func getCommand() *cobra.Command {
	var t target
	var out format
	var wide bool
	cmd := &cobra.Command{
		Use:   "get services|routes|endpoints|clients|certs [SERVICE]",
		Short: "List what the mesh holds",
		Long: `List what the control plane holds: services, the routes of calls to them in the order in which
they are tried, endpoints and why one is not called, xDS clients and what they acknowledged or
rejected, and the certificates that have not expired.`,
		Example: `  inlay get services
  inlay get routes orders
  inlay get endpoints orders -o json
  inlay get clients --resources`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) < 1 || len(args) > 2 {
				return usageError(fmt.Errorf("%d arguments: want one of services, routes, endpoints, clients, certs, and for routes and endpoints perhaps a service", len(args)))
			}
			return nil
		},
		ValidArgs: []string{"services", "routes", "endpoints", "clients", "certs"},
		RunE: func(c *cobra.Command, args []string) error {
			namespace, service := "", ""
			if len(args) == 2 {
				if args[0] != "routes" && args[0] != "endpoints" {
					return usageError(fmt.Errorf("get %s takes no service", args[0]))
				}
				var err error
				if namespace, service, err = splitService(args[1]); err != nil {
					return err
				}
			}
			g := getter{c.Context(), &t, out, c, namespace, service}
			switch args[0] {
			case "services":
				return g.services()
			case "routes":
				return g.routes()
			case "endpoints":
				return g.endpoints()
			case "clients":
				return g.clients(wide)
			case "certs":
				return g.certs()
			}
			return usageError(fmt.Errorf("get %q: want services, routes, endpoints, clients or certs", args[0]))
		},
	}
	t.flags(cmd)
	outputFlag(cmd, &out)
	cmd.Flags().BoolVar(&wide, "resources", false, "with clients: every resource of each client")
	return cmd
}

type getter struct {
	ctx                context.Context
	t                  *target
	out                format
	c                  *cobra.Command
	namespace, service string
}

func (g getter) services() error {
	r, err := ask(g.ctx, g.t, &adminpb.ListServicesRequest{}, adminconnect.AdminClient.ListServices)
	if err != nil {
		return err
	}
	return g.out.print(g.c.OutOrStdout(), r, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "NAMESPACE\tSERVICE\tPORTS\tMTLS\tVERSIONS\tREADY\tADDRESSES\tSOURCE")
		for _, s := range r.Services {
			var ports []string
			for _, p := range s.Ports {
				ports = append(ports, fmt.Sprintf("%d/%s", p.Port, p.Protocol))
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d/%d\t%s\t%s\n", s.Namespace, s.Name, dash(strings.Join(ports, ",")), s.Mtls,
				dash(strings.Join(s.Versions, ",")), s.Ready, s.Endpoints, dash(strings.Join(s.VirtualAddresses, ",")), dash(s.Source))
		}
	})
}

func (g getter) routes() error {
	r, err := ask(g.ctx, g.t, &adminpb.ListRoutesRequest{Namespace: g.namespace, Service: g.service}, adminconnect.AdminClient.ListRoutes)
	if err != nil {
		return err
	}
	return g.out.print(g.c.OutOrStdout(), r, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "SERVICE\tPORT\tMATCH\tTO\tTIMEOUT\tRETRIES\tROUTE\tRULE\tSOURCE\tCLIENTS")
		for _, rt := range r.Routes {
			var to []string
			for _, b := range rt.Backends {
				text := fmt.Sprintf("%s=%d", b.Cluster, b.Weight)
				if b.Invalid != "" {
					text += " (" + b.Invalid + ")"
				}
				to = append(to, text)
			}
			var kinds []string
			for k, v := range rt.Clients {
				// The reason behind the colon is in -o json; here it would push all else off the screen.
				word, _, _ := strings.Cut(v, ":")
				kinds = append(kinds, k+" "+word)
			}
			slices.Sort(kinds)
			timeout := "-"
			if d := rt.RequestTimeout.AsDuration(); d > 0 {
				timeout = d.String()
			}
			fmt.Fprintf(w, "%s.%s\t%d\t%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", rt.Service, rt.Namespace, rt.Port, rt.Match,
				strings.Join(to, ", "), timeout, rt.Retries, rt.Object, rt.Rule, dash(rt.Source), dash(strings.Join(kinds, ", ")))
		}
	})
}

func (g getter) endpoints() error {
	r, err := ask(g.ctx, g.t, &adminpb.ListEndpointsRequest{Namespace: g.namespace, Service: g.service}, adminconnect.AdminClient.ListEndpoints)
	if err != nil {
		return err
	}
	return g.out.print(g.c.OutOrStdout(), r, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "SERVICE\tPORT\tADDRESS\tINSTANCE\tLABELS\tHEALTH\tTLS\tORIGIN\tLEASE\tNOT CALLED BECAUSE")
		for _, e := range r.Endpoints {
			var labels []string
			for k, v := range e.Labels {
				labels = append(labels, k+"="+v)
			}
			slices.Sort(labels)
			lease := "-"
			if e.LeaseExpires != nil {
				lease = left(e.LeaseExpires)
			}
			fmt.Fprintf(w, "%s.%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Service, e.Namespace, e.Port, strings.Join(e.Addresses, ","),
				dash(e.InstanceId), dash(strings.Join(labels, ",")), e.Health, e.Tls, e.Origin, lease, dash(e.Unreachable))
		}
	})
}

func (g getter) clients(resources bool) error {
	// The table needs the resources too, to name what was rejected or withheld.
	r, err := ask(g.ctx, g.t, &adminpb.ListClientsRequest{Resources: resources || g.out == formatTable}, adminconnect.AdminClient.ListClients)
	if err != nil {
		return err
	}
	return g.out.print(g.c.OutOrStdout(), r, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "NODE\tIDENTITY\tKIND\tPROTOCOL\tSDK\tAGE\tSUBSCRIBED\tSTATE\tNOTES")
		for _, cl := range r.Clients {
			var notes []string
			for _, s := range cl.Resources {
				if s.Nack != "" {
					notes = append(notes, fmt.Sprintf("rejected %s: %s", s.Name, s.Nack))
				}
				if s.Withheld != "" {
					notes = append(notes, fmt.Sprintf("withheld %s: %s", s.Name, s.Withheld))
				}
			}
			for _, f := range cl.NotHonoured {
				notes = append(notes, "not honoured: "+f)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n", cl.NodeId, dash(cl.Identity), cl.Kind, cl.Protocol, dash(cl.SdkVersion),
				age(cl.Connected), cl.Subscribed, cl.State, dash(strings.Join(notes, "; ")))
			if !resources {
				continue
			}
			for _, s := range cl.Resources {
				fmt.Fprintf(w, "  %s\t%s\tsent %s\tacked %s\n", s.TypeUrl[strings.LastIndexByte(s.TypeUrl, '.')+1:], s.Name, dash(s.Sent), dash(s.Acked))
			}
		}
	})
}

func (g getter) certs() error {
	r, err := ask(g.ctx, g.t, &adminpb.ListCertsRequest{}, adminconnect.AdminClient.ListCerts)
	if err != nil {
		return err
	}
	return g.out.print(g.c.OutOrStdout(), r, func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "SPIFFE ID\tSERIAL\tEXPIRES IN\tAUTHORITY")
		for _, ce := range r.Certs {
			authority := "-"
			if ce.Authority {
				authority = "yes"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", ce.SpiffeId, ce.Serial, left(ce.NotAfter), authority)
		}
	})
}

func age(t *timestamppb.Timestamp) string {
	return time.Since(t.AsTime()).Round(time.Second).String()
}

func left(t *timestamppb.Timestamp) string {
	return time.Until(t.AsTime()).Round(time.Second).String()
}
