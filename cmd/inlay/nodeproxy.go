package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/proxy"
)

func nodeProxyCommand() *cobra.Command {
	var f pinFlags
	var pin, suffix string
	var upstreams []string
	log := logFlags{}
	cmd := &cobra.Command{
		Use:    "proxy",
		Hidden: true,
		Short:  "Answer DNS for managed programs (the node agent starts it)",
		Long: `Answer the names of the mesh for managed programs, on sockets that outlive the node agent, which starts
this by itself, one for a network namespace, and replaces it when its version changes: the sockets are
handed on and no query is lost. When it dies, queries go to the real resolvers within a second.`,
		Example: "  sudo inlay node proxy --cgroup inlay --dns-suffix mesh",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			p, err := placesFor(f.runDir, true)
			if err != nil {
				return err
			}
			if pin == "" {
				if _, pin, _, err = f.find(); err != nil {
					return err
				}
			}
			cfg := proxy.Config{
				Socket: p.proxySocket(), Suffix: suffix, Version: versionText(),
				Log: log.logger(c.ErrOrStderr()).With("daemon", "proxy"),
			}
			for _, u := range upstreams {
				a, err := parseResolver(u)
				if err != nil {
					return err
				}
				cfg.Upstreams = append(cfg.Upstreams, a)
			}
			if cfg.Maps, err = load.OpenMaps(pin); errors.Is(err, fs.ErrNotExist) {
				return &exitError{exitAbsent, err}
			} else if err != nil {
				return err
			}
			defer func() { _ = cfg.Maps.Close() }()
			return proxy.Run(c.Context(), cfg)
		},
	}
	f.flags(cmd)
	cmd.Flags().StringVar(&pin, "pin", "", "directory of the pins (default: that of the cgroup)")
	cmd.Flags().StringVar(&suffix, "dns-suffix", "mesh", "the suffix in which NAME.NAMESPACE resolves")
	cmd.Flags().StringArrayVar(&upstreams, "upstream", nil, "IP or IP:PORT of a resolver for other names; may be repeated (default: those of /etc/resolv.conf)")
	log.flags(cmd)
	return cmd
}

// parseResolver reads IP or IP:PORT.
func parseResolver(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, 53), nil
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 {
		return a, usageError(fmt.Errorf("--upstream %q: want IP or IP:PORT of a resolver", s))
	}
	return a, nil
}

// stopProxy ends the DNS proxy whose control socket is at path; false when none runs, or the one that
// does is not meant.
func stopProxy(ctx context.Context, path string, meant func(proxy.Status) bool) (bool, error) {
	switch s, err := proxy.Ask(ctx, path); {
	case errors.Is(err, proxy.ErrNotRunning):
		return false, nil
	case err != nil:
		return false, err
	case !meant(s):
		return false, nil
	}
	return true, proxy.Stop(ctx, path)
}
