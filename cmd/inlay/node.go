package main

import (
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane/workload"
)

func nodeCommand() *cobra.Command {
	var runDir, controlPlane, trustDomain string
	var users []string
	var devUser, readyFD int
	log := logFlags{}
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Attest the programs of this machine and hand them their identities",
		Long: `Run the node: it attests the programs below ` + "`inlay run`" + `, makes their keys, has their
certificates signed by the control plane and serves the SPIFFE Workload API. It needs no privilege.
Without --allow only its own user may run services.`,
		Example: `  inlay node --allow 1000=cart,orders --allow 1001=*`,
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := placesAt(runDir)
			if err != nil {
				return err
			}
			if controlPlane == "" {
				controlPlane = p.xdsSocket()
			}
			allowed, err := parseUsers(users, devUser)
			if err != nil {
				return err
			}
			cfg := workload.Config{
				RunDir: p.run, ControlPlane: controlPlane, TrustDomain: trustDomain, Users: allowed,
				Log: log.logger(c.ErrOrStderr()).With("daemon", "node"),
			}
			return workload.Run(c.Context(), cfg, func(n *workload.Node) error {
				return tellReady(readyFD, map[string]string{"workload": n.WorkloadSocket(), "node": n.NodeSocket()})
			})
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", "", "directory of the sockets (default $XDG_RUNTIME_DIR/inlay, else ~/.inlay/run)")
	cmd.Flags().StringVar(&controlPlane, "control-plane", "", "unix socket of the control plane (default: in the run directory)")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "inlay.local", "SPIFFE trust domain")
	cmd.Flags().StringArrayVar(&users, "allow", nil, "UID=SERVICE[,SERVICE...] that a user may run: NAME, NAMESPACE/NAME or *; may be repeated")
	cmd.Flags().IntVar(&devUser, "dev-user", -1, "uid of the user who started `inlay dev`: may run every service")
	cmd.Flags().IntVar(&readyFD, "ready-fd", 0, "descriptor to write one line of JSON to when ready")
	_ = cmd.Flags().MarkHidden("dev-user")
	_ = cmd.Flags().MarkHidden("ready-fd")
	log.flags(cmd)
	return cmd
}

// parseUsers reads --allow. Nothing given leaves the node's default: its own user, every service.
func parseUsers(flags []string, devUser int) (map[uint32][]string, error) {
	var out map[uint32][]string
	add := func(uid uint32, services ...string) {
		if out == nil {
			out = map[uint32][]string{}
		}
		out[uid] = append(out[uid], services...)
	}
	for _, f := range flags {
		uid, services, ok := strings.Cut(f, "=")
		n, err := strconv.ParseUint(uid, 10, 32)
		if !ok || err != nil || services == "" {
			return nil, usageError(fmt.Errorf("--allow %q: want UID=SERVICE[,SERVICE...], as 1000=cart,orders", f))
		}
		add(uint32(n), strings.Split(services, ",")...)
	}
	if devUser >= 0 {
		add(uint32(devUser), "*")
	}
	return out, nil
}

// logFlags choose how a daemon logs.
type logFlags struct {
	level slog.Level
	json  bool
}

func (l *logFlags) flags(c *cobra.Command) {
	c.Flags().TextVar(&l.level, "log-level", slog.LevelWarn, "debug, info, warn or error")
	c.Flags().BoolVar(&l.json, "log-json", false, "log as JSON")
}

func (l *logFlags) logger(w interface{ Write([]byte) (int, error) }) *slog.Logger {
	o := &slog.HandlerOptions{Level: l.level}
	if l.json {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
