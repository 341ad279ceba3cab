package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane"
	"github.com/inlay-mesh/inlay/xds"
)

// virtualFlags are the ranges of the services' own addresses.
type virtualFlags struct{ v4, v6 prefixFlag }

func (f *virtualFlags) flags(c *cobra.Command) {
	f.v4.ipv4 = true
	c.Flags().Var(&f.v4, "virtual-ipv4", "range of the services' virtual IPv4 addresses (default 198.18.0.0/15)")
	c.Flags().Var(&f.v6, "virtual-ipv6", "range of the services' virtual IPv6 addresses (default fd69:6e6c:6179::/64)")
}

// args are the flags as a command line.
func (f *virtualFlags) args() []string {
	var out []string
	for name, p := range map[string]prefixFlag{"--virtual-ipv4": f.v4, "--virtual-ipv6": f.v6} {
		if p.IsValid() {
			out = append(out, name+"="+p.String())
		}
	}
	slices.Sort(out)
	return out
}

// prefixFlag is a range of addresses of one family; the zero value is the default one.
type prefixFlag struct {
	netip.Prefix
	ipv4 bool
}

func (p *prefixFlag) Type() string { return "CIDR" }

func (p *prefixFlag) String() string {
	if !p.IsValid() {
		return ""
	}
	return p.Prefix.String()
}

// Set reads a CIDR without bits behind its mask.
func (p *prefixFlag) Set(s string) error {
	got, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return errors.New("want a range of addresses, as 198.18.0.0/15")
	case got.Addr().Is4() != p.ipv4:
		return errors.New("want a range of the family that the flag names")
	case got != got.Masked():
		return fmt.Errorf("bits are set behind the mask: want %s", got.Masked())
	}
	p.Prefix = got
	return nil
}

func controlplaneCommand() *cobra.Command {
	var f devFlags
	var readyFD int
	log := logFlags{}
	cmd := &cobra.Command{
		Use:   "controlplane",
		Short: "Turn YAML into xDS, keep the registry, sign identities",
		Long: `Run the control plane in the foreground. ` + "`inlay dev`" + ` starts one of these and one node; run it by
itself where a service manager does the watching.`,
		Example: "  inlay controlplane --config /etc/inlay/mesh --data /var/lib/inlay",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := placesAt(f.runDir)
			if err != nil {
				return err
			}
			if f.data == "" {
				if f.data, err = defaultData(); err != nil {
					return err
				}
			}
			cp, err := controlplane.New(controlplane.Config{
				ConfigDir: f.config, DataDir: f.data, RunDir: p.run, TrustDomain: f.trustDomain,
				Plaintext: f.xdsAddr, MTLS: f.xdsMTLSAddr, Admin: f.adminAddr,
				UnixSocket: p.xdsSocket(), NodeSocket: p.nodeSocket(), SVIDTTL: f.svidTTL,
				VirtualIPv4: f.virtual.v4.Prefix, VirtualIPv6: f.virtual.v6.Prefix,
				Version: versionText(), EncodeSnapshot: encodeSnapshot,
				Log: log.logger(c.ErrOrStderr()).With("daemon", "controlplane"),
			})
			if err != nil {
				return err
			}
			return runControlPlane(c.Context(), cp, readyFD)
		},
	}
	cmd.Flags().StringVar(&f.config, "config", "", "directory of YAML files, read recursively; empty: registered services only")
	cmd.Flags().StringVar(&f.data, "data", "", "directory of what outlives a restart (default $XDG_DATA_HOME/inlay, else ~/.local/share/inlay)")
	cmd.Flags().StringVar(&f.runDir, "run-dir", "", "directory of sockets (default $XDG_RUNTIME_DIR/inlay, else ~/.inlay/run)")
	cmd.Flags().StringVar(&f.trustDomain, "trust-domain", "inlay.local", "SPIFFE trust domain")
	cmd.Flags().StringVar(&f.xdsAddr, "xds-addr", "", "plaintext xDS, loopback and development only, as 127.0.0.1:15010; empty: off")
	cmd.Flags().StringVar(&f.xdsMTLSAddr, "xds-mtls-addr", ":15012", "xDS with mutual TLS; empty: off")
	cmd.Flags().StringVar(&f.adminAddr, "admin-addr", "127.0.0.1:15080", "admin API, loopback only")
	cmd.Flags().DurationVar(&f.svidTTL, "svid-ttl", time.Hour, "lifetime of certificates")
	f.virtual.flags(cmd)
	cmd.Flags().IntVar(&readyFD, "ready-fd", 0, "descriptor to write one line of JSON to when ready")
	_ = cmd.Flags().MarkHidden("ready-fd")
	log.flags(cmd)
	return cmd
}

// firstRevision is how long readiness waits for the first revision to be served.
const firstRevision = 500 * time.Millisecond

// runControlPlane runs until ctx is done or a part of it ends by itself.
func runControlPlane(ctx context.Context, cp *controlplane.ControlPlane, readyFD int) error {
	if err := cp.Start(ctx); err != nil {
		return err
	}
	select {
	case <-cp.Ready():
	case <-cp.Failed():
	case <-ctx.Done():
	case <-time.After(firstRevision):
		// A configuration that is refused at the first start: no revision is served yet, but the
		// control plane runs, and says so to whoever asks.
	}
	err := tellReady(readyFD, cp.Addresses())
	if err == nil {
		select {
		case <-cp.Failed():
			err = cp.Err()
		case <-ctx.Done():
		}
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return errors.Join(err, cp.Stop(stop))
}

// encodeSnapshot writes resources in the format of the SDK's cache, which only this module and
// the SDK know.
func encodeSnapshot(s controlplane.Snapshot) ([]byte, error) {
	all := make([]xds.RawResource, len(s.Resources))
	for i, r := range s.Resources {
		all[i] = rawResource(r)
	}
	return xds.EncodeSnapshot(all, xds.Meta{
		TrustDomain: s.TrustDomain, SPIFFEID: s.SPIFFEID, Revision: s.Revision, Namespaces: s.Namespaces, Written: s.Written,
	}), nil
}
