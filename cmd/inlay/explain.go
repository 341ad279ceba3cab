package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
	"github.com/inlay-mesh/inlay/meshsdk"
	"github.com/inlay-mesh/inlay/xds/meshpb/adminpb"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

func explainCommand() *cobra.Command {
	var t target
	var out format
	var from, config string
	var headers []string
	cmd := &cobra.Command{
		Use:   "explain METHOD URL --from SERVICE",
		Short: "Say where a call would go, and why",
		Long: `Say where a call would go, and why: the route and the file and line it came from, the routes that
were passed over, the clusters and their shares, the endpoints and why one is left out. Nothing is
sent. The newest live program of the calling service answers; with none alive its configuration is
compiled and the same engine is asked here. The first line says which. A call that would fail ends
with exit code 1.`,
		Example: `  inlay explain GET http://orders/v1/7 --from cart
  inlay explain POST http://orders/shop.v1.Orders/Place --from cart --header x-canary=yes
  inlay explain GET http://orders/v1/7 --from cart --config ./mesh    (nothing needs to run)`,
		Args: exactly("METHOD", "URL"),
		RunE: func(c *cobra.Command, args []string) error {
			if from == "" {
				return usageError(errors.New("--from is missing: which service makes the call?"))
			}
			namespace, service, err := splitService(from)
			if err != nil {
				return err
			}
			q := question{namespace: namespace, service: service, method: args[0], url: args[1], headers: http.Header{}}
			for _, h := range headers {
				k, v, ok := strings.Cut(h, "=")
				if !ok {
					return usageError(fmt.Errorf("--header %q: want NAME=VALUE", h))
				}
				q.headers.Add(k, v)
			}
			resp, by, err := q.answer(c.Context(), &t, config)
			if err != nil {
				return err
			}
			if err := out.print(c.OutOrStdout(), resp, func(w *tabwriter.Writer) {
				printDecision(w, by, resp.Decision)
				if config == "" && resp.Decision.GetReason() == string(meshsdk.ReasonNoEndpoint) {
					fmt.Fprintf(w, "see\tinlay get endpoints %s\tlists those that are there and why they are not called\n", resp.Decision.Service)
				}
			}); err != nil {
				return err
			}
			if r := resp.Decision.GetReason(); r != "" && r != string(meshsdk.ReasonOK) {
				return &exitError{exitFailed, nil}
			}
			return nil
		},
	}
	t.flags(cmd)
	outputFlag(cmd, &out)
	cmd.Flags().StringVar(&from, "from", "", "calling service: NAME or NAME.NAMESPACE")
	cmd.Flags().StringArrayVar(&headers, "header", nil, "NAME=VALUE header of the call; may be repeated")
	cmd.Flags().StringVar(&config, "config", "", "ask a directory of YAML instead of a running mesh")
	return cmd
}

type question struct {
	namespace, service string
	method, url        string
	headers            http.Header
}

// answer asks the running mesh, or the directory when one is named. by says who answered.
func (q question) answer(ctx context.Context, t *target, config string) (resp *adminpb.ExplainResponse, by string, err error) {
	if config != "" {
		m, findings, err := compileDir(config, "inlay.local")
		if err != nil {
			return nil, "", err
		}
		if m == nil {
			printFindings(os.Stderr, findings)
			return nil, "", faultsError(config, findings)
		}
		raw, _, err := snapshotOf(m, q.namespace, q.service)
		if err != nil {
			return nil, "", err
		}
		resp, err := q.here(ctx, raw)
		if err != nil {
			var known []string
			for _, s := range m.Services {
				known = append(known, q.nameOf(s.Namespace, s.Name))
			}
			return nil, "", q.suggest(err, known)
		}
		return resp, fmt.Sprintf("answered here, from %s (revision %s)", config, m.Revision), nil
	}
	req := &adminpb.ExplainRequest{Namespace: q.namespace, Service: q.service, Method: q.method, Url: q.url}
	for _, k := range slices.Sorted(maps.Keys(q.headers)) {
		for _, v := range q.headers[k] {
			req.Headers = append(req.Headers, &reportpb.Header{Name: strings.ToLower(k), Value: v})
		}
	}
	resp, err = ask(ctx, t, req, adminconnect.AdminClient.Explain)
	if err != nil {
		return nil, "", err
	}
	if resp.Error != "" {
		return nil, "", q.suggestRunning(ctx, t, errors.New(resp.Error))
	}
	if resp.AnsweredBy != "" {
		return resp, fmt.Sprintf("answered by %s, a live program of %s.%s (revision %s)", resp.AnsweredBy, q.service, q.namespace, resp.Decision.GetRevision()), nil
	}
	snap, err := ask(ctx, t, &adminpb.GetSnapshotRequest{Namespace: q.namespace, Service: q.service}, adminconnect.AdminClient.GetSnapshot)
	if err != nil {
		return nil, "", err
	}
	if resp, err = q.here(ctx, snap.Snapshot); err != nil {
		return nil, "", q.suggestRunning(ctx, t, err)
	}
	return resp, fmt.Sprintf("answered here, since no program of %s.%s is alive: its configuration compiled (revision %s)", q.service, q.namespace, snap.Revision), nil
}

// suggestRunning is suggest among the services of the running mesh.
func (q question) suggestRunning(ctx context.Context, t *target, err error) error {
	r, asked := ask(ctx, t, &adminpb.ListServicesRequest{}, adminconnect.AdminClient.ListServices)
	if asked != nil {
		return err // it matters more than why nothing can be suggested
	}
	var known []string
	for _, s := range r.Services {
		known = append(known, q.nameOf(s.Namespace, s.Name))
	}
	return q.suggest(err, known)
}

// nameOf is how the calling service names another one.
func (q question) nameOf(namespace, name string) string {
	if namespace == q.namespace {
		return name
	}
	return name + "." + namespace
}

// suggest adds the name most like the one asked for, where that one is not known. A program knows
// only the services that it has called; here all are.
func (q question) suggest(err error, known []string) error {
	u, parsed := url.Parse(q.url)
	if parsed != nil || slices.Contains(known, u.Hostname()) {
		return err
	}
	near := tree.Nearest(u.Hostname(), known)
	if near == "" || strings.Contains(err.Error(), "did you mean") {
		return err
	}
	return fmt.Errorf("%w; did you mean %q?", err, near)
}

// here asks the SDK's own engine, fed from a snapshot.
func (q question) here(ctx context.Context, snapshot []byte) (*adminpb.ExplainResponse, error) {
	dir, err := os.MkdirTemp("", "inlay-explain-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	file := filepath.Join(dir, "snapshot")
	if err := os.WriteFile(file, snapshot, 0o600); err != nil {
		return nil, err
	}
	m, err := meshsdk.Open(ctx, meshsdk.WithConfig(file), meshsdk.WithService(q.service+"."+q.namespace), meshsdk.WithStateDir(dir),
		// This process is not the service: it neither asks a node for its identity nor speaks of that.
		meshsdk.WithEnvironment(func(string) string { return "" }), meshsdk.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		return nil, err
	}
	defer func() { _ = m.Close() }()
	d, err := m.Explain(ctx, q.method, q.url, q.headers)
	if err != nil {
		return nil, err
	}
	return &adminpb.ExplainResponse{Decision: meshsdk.DecisionProto(d)}, nil
}

func printDecision(w io.Writer, by string, d *reportpb.Decision) {
	fmt.Fprintln(w, by)
	if d == nil {
		return
	}
	for _, s := range d.Skipped {
		fmt.Fprintf(w, "passed over\t%s\t%s\n", routeText(s.Route), s.Why)
	}
	if d.Route != nil {
		fmt.Fprintf(w, "route\t%s\t%s\n", routeText(d.Route), dash(d.Route.Source))
	}
	if t := d.RequestTimeout.AsDuration(); t > 0 {
		fmt.Fprintf(w, "timeout\t%v\n", t)
	}
	if t := d.PerTryTimeout.AsDuration(); t > 0 {
		fmt.Fprintf(w, "per try\t%v\n", t)
	}
	if d.MaxRetries > 0 {
		fmt.Fprintf(w, "retries\tat most %d\n", d.MaxRetries)
	}
	var total uint32
	for _, c := range d.Candidates {
		total += c.Weight
	}
	for _, c := range d.Candidates {
		share := 0.0
		if total > 0 {
			share = 100 * float64(c.Weight) / float64(total)
		}
		fmt.Fprintf(w, "cluster\t%s\t%.0f %%\t%s\n", c.Cluster, share, c.Invalid)
	}
	for _, e := range d.Endpoints {
		state := "can be picked"
		if e.Excluded != "" {
			state = "left out: " + e.Excluded
		}
		fmt.Fprintf(w, "endpoint\t%s\t%s\t%s\n", e.Address, e.Tls, state)
	}
	for _, l := range d.Limits {
		fmt.Fprintf(w, "limit\t%s\n", l)
	}
	fmt.Fprintf(w, "outcome\t%s\t%s\n", dash(d.Reason), d.Detail)
}

func routeText(r *reportpb.RouteChoice) string {
	if r == nil {
		return "-"
	}
	if r.Rule == "" {
		return r.Object
	}
	return r.Object + " rule " + r.Rule
}
