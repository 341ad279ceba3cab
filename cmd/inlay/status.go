package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
)

func statusCommand() *cobra.Command {
	var t target
	var out format
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the mesh at a glance",
		Long: `Show where the control plane listens, which revision of the configuration runs, how many clients
acknowledged it, and why newer files were refused, if they were.`,
		Example: "  inlay status\n  inlay status -o json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := ask(c.Context(), &t, &adminpb.GetStatusRequest{}, adminconnect.AdminClient.GetStatus)
			if err != nil {
				return err
			}
			return out.print(c.OutOrStdout(), s, func(w *tabwriter.Writer) {
				fmt.Fprintf(w, "control plane\tpid %d, version %s, since %s\n", s.Pid, s.Version, s.Started.AsTime().Local().Format("15:04:05"))
				fmt.Fprintf(w, "trust domain\t%s\n", s.TrustDomain)
				var names []string
				for name := range s.Addresses {
					names = append(names, name)
				}
				slices.Sort(names)
				for _, name := range names {
					fmt.Fprintf(w, "%s\t%s\n", name, s.Addresses[name])
				}
				fmt.Fprintf(w, "configuration\t%s\n", dash(s.ConfigDir))
				fmt.Fprintf(w, "data\t%s\n", dash(s.DataDir))
				fmt.Fprintf(w, "mesh\t%d services, %d endpoints, %d clients\n", s.Services, s.Endpoints, s.Clients)
				printRevision(w, s.Revision)
			})
		},
	}
	t.flags(cmd)
	outputFlag(cmd, &out)
	return cmd
}

// printRevision writes what runs, who has it, and what stands in the way of the newest files.
func printRevision(w io.Writer, r *adminpb.Revision) {
	if r == nil {
		return
	}
	fmt.Fprintf(w, "revision\t%s\n", revisionLine(r))
	for _, f := range r.Faults {
		fmt.Fprintf(w, "refused\t%s %s %s\n", f.Source, f.Code, f.Message)
	}
	for _, f := range r.Warnings {
		fmt.Fprintf(w, "warning\t%s %s %s\n", f.Source, f.Code, f.Message)
	}
}

// revisionLine is one line on a revision.
func revisionLine(r *adminpb.Revision) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s of %s: %d objects; %d of %d clients acknowledged it", dash(r.Id), r.Time.AsTime().Local().Format("15:04:05"), r.Objects, r.Acked, r.Subscribed)
	if r.Nacked > 0 {
		fmt.Fprintf(&b, ", %d rejected part of it (inlay get clients)", r.Nacked)
	}
	if n := len(r.Faults); n > 0 {
		fmt.Fprintf(&b, "; newer files are refused for %d faults, this one serves on", n)
	}
	return b.String()
}
