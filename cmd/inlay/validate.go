package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/controlplane/compile"
	"github.com/inlay-mesh/inlay/controlplane/config"
	"github.com/inlay-mesh/inlay/controlplane/ir"
	"github.com/inlay-mesh/inlay/controlplane/source"
)

func validateCommand() *cobra.Command {
	var out format
	cmd := &cobra.Command{
		Use:   "validate DIR",
		Short: "Check a directory of YAML as the control plane would",
		Long: `Check a directory of YAML as the control plane would: every fault at once, each as
file:line:col CODE message. Warnings do not fail; faults end with exit code 4. Nothing needs to run.`,
		Example: "  inlay validate ./mesh\n  inlay validate ./mesh -o json",
		Args:    exactly("DIR"),
		RunE: func(c *cobra.Command, args []string) error {
			_, findings, err := compileDir(args[0], "inlay.local")
			if err != nil {
				return err
			}
			if out != formatTable {
				if err := out.printValue(c.OutOrStdout(), findingsValue(findings)); err != nil {
					return err
				}
			} else {
				printFindings(c.OutOrStdout(), findings)
			}
			return faultsError(args[0], findings)
		},
	}
	outputFlag(cmd, &out)
	return cmd
}

// compileDir reads, parses and compiles a directory, without any registered instance. The mesh is
// nil when there are faults.
func compileDir(dir, trustDomain string) (*ir.Mesh, []config.Finding, error) {
	if st, err := os.Stat(dir); err != nil {
		return nil, nil, fmt.Errorf("configuration: %w", err)
	} else if !st.IsDir() {
		return nil, nil, fmt.Errorf("configuration: %s is a file: want a directory of YAML files", dir)
	}
	rev, err := source.Load(dir, source.Limits{})
	if err != nil {
		return nil, nil, err
	}
	set, findings := config.Parse(rev.Files)
	m, more := compile.Compile(compile.Input{Set: set, TrustDomain: trustDomain, Revision: rev.ID})
	findings = config.SortFindings(append(findings, more...))
	if config.HasFaults(findings) {
		return nil, findings, nil
	}
	return m, findings, nil
}

func printFindings(w io.Writer, findings []config.Finding) {
	for _, f := range findings {
		fmt.Fprintln(w, f.String())
	}
}

func findingsValue(findings []config.Finding) any {
	type finding struct {
		Severity string `json:"severity"`
		Code     string `json:"code"`
		Source   string `json:"source"`
		Message  string `json:"message"`
	}
	out := struct {
		Findings []finding `json:"findings"`
	}{[]finding{}}
	for _, f := range findings {
		severity := "warning"
		if f.Severity == config.Fault {
			severity = "fault"
		}
		out.Findings = append(out.Findings, finding{severity, f.Code, fmt.Sprintf("%s:%d:%d", f.File, f.Line, f.Col), f.Message})
	}
	return out
}

// faultsError is exit code 4 when there are faults.
func faultsError(dir string, findings []config.Finding) error {
	faults := 0
	for _, f := range findings {
		if f.Severity == config.Fault {
			faults++
		}
	}
	if faults == 0 {
		return nil
	}
	return &exitError{exitFaults, fmt.Errorf("%s: %d faults: a control plane would refuse this and serve the last good revision on", dir, faults)}
}
