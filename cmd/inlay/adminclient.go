package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane/admin/adminconnect"
)

// target says which control plane a verb asks.
type target struct {
	runDir string
	admin  string
}

func (t *target) flags(c *cobra.Command) {
	c.Flags().StringVar(&t.runDir, "run-dir", "", "run directory of the mesh (default $XDG_RUNTIME_DIR/inlay, else ~/.inlay/run, else "+systemRun+")")
	c.Flags().StringVar(&t.admin, "admin", "", "host:port of the control plane's admin API (default: found in the run directory)")
}

// client returns a client of the admin API; nothing is dialled yet.
func (t *target) client() (adminconnect.AdminClient, string, error) {
	addr := t.admin
	if addr == "" {
		p, err := placesOf(t.runDir)
		if err != nil {
			return nil, "", err
		}
		s, err := p.readState()
		if err != nil {
			return nil, "", err
		}
		if addr = s.Addresses["admin"]; addr == "" {
			return nil, "", &exitError{exitAbsent, fmt.Errorf("the control plane (pid %d) serves no admin API: start it with --admin-addr", s.PID)}
		}
	}
	hc := &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext}}
	return adminconnect.NewAdminClient(hc, "http://"+addr), addr, nil
}

// asked turns an error of the admin API into one for a person.
func asked(addr string, err error) error {
	if err == nil {
		return nil
	}
	var refused *net.OpError
	if connect.CodeOf(err) == connect.CodeUnavailable && errors.As(err, &refused) && refused.Op == "dial" {
		return &exitError{exitAbsent, fmt.Errorf("no control plane answers at %s: %w; start one with `inlay dev`, or see who should run with `inlay status`", addr, refused.Err)}
	}
	var ce *connect.Error
	if errors.As(err, &ce) {
		return errors.New(ce.Message())
	}
	return err
}

// ask calls one unary method of the admin API.
func ask[Req, Resp any](ctx context.Context, t *target, req *Req, method func(adminconnect.AdminClient, context.Context, *connect.Request[Req]) (*connect.Response[Resp], error)) (*Resp, error) {
	c, addr, err := t.client()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	resp, err := method(c, ctx, connect.NewRequest(req))
	if err != nil {
		return nil, asked(addr, err)
	}
	return resp.Msg, nil
}
