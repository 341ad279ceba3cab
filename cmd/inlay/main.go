// Command inlay is the one binary of the mesh: the daemons (controlplane, node, and dev, which
// starts one of each), run for programs, and the verbs that read, check and explain.
//
// It is the only place that composes the control plane, the node and the SDK; what they do is
// theirs. One file a verb.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes, as `inlay --help` documents them. `inlay run` returns its child's own code.
const (
	exitFailed      = 1 // the verb did not succeed
	exitUsage       = 2 // the command line is wrong
	exitUnsupported = 3 // this machine, or this user on it, cannot run eBPF programs
	exitFaults      = 4 // the configuration has faults
	exitAbsent      = 5 // nothing runs where the verb looked
	exitRunning     = 6 // another one runs already
)

// exitError carries an exit code other than 1.
type exitError struct {
	code int
	err  error // nil: nothing more to print
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

const exitHelp = `Exit codes: 0 done, 1 failed, 2 wrong command line, 3 no eBPF here (root, cgroup2, BTF and Linux 6.1
are what it needs), 4 faults in the configuration, 5 nothing runs there, 6 another one runs already.
` + "`inlay run`" + ` returns the code of its program: 128 + the signal when one ended it, 126 when it cannot be
started, 127 when there is none.`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := root().ExecuteContext(ctx)
	stop()
	os.Exit(report(os.Stderr, err))
}

// report writes an error for a person to w and returns the exit code.
func report(w io.Writer, err error) int {
	if err == nil {
		return 0
	}
	code := exitFailed
	var coded *exitError
	if errors.As(err, &coded) {
		code = coded.code
		if coded.err == nil {
			err = nil
		}
	}
	if err != nil {
		fmt.Fprintf(w, "%s%v\n", reportPrefix, err)
	}
	return code
}

// reportPrefix begins what report writes; `inlay dev` knows the last words of its daemons by it.
const reportPrefix = "inlay: "

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inlay",
		Short: "A service mesh that is linked into services",
		Long: `Inlay is a service mesh that is linked into services: Go programs import meshsdk, a control
plane turns YAML into xDS and issues identities, and nothing stands between two services.

` + exitHelp,
		Example: `  inlay demo                                   five services, mutual TLS, a live table
  inlay dev --config ./mesh                    a mesh for this laptop
  inlay run --service cart -- ./cart           a program in it
  inlay explain GET http://orders/v1/7 --from cart
  sudo inlay run --ebpf --service billing --port 8080 -- ./billing     a program without the SDK`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			hint := ""
			if near := c.SuggestionsFor(args[0]); len(near) > 0 {
				hint = fmt.Sprintf("; did you mean %s?", strings.Join(near, " or "))
			}
			return usageError(fmt.Errorf("unknown verb %q%s; see `inlay --help`", args[0], hint))
		},
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError(fmt.Errorf("%w; see `%s --help`", err, c.CommandPath()))
	})
	cmd.SuggestionsMinimumDistance = 2
	cmd.CompletionOptions.HiddenDefaultCmd = true
	cmd.AddCommand(
		devCommand(), controlplaneCommand(), nodeCommand(), runCommand(),
		demoCommand(), demoServiceCommand(), demoLegacyCommand(),
		getCommand(), statusCommand(), explainCommand(), observeCommand(),
		validateCommand(), compileCommand(), bootstrapCommand(), versionCommand(),
	)
	return cmd
}

func usageError(err error) error { return &exitError{exitUsage, err} }

// exactly is cobra.ExactArgs with a message that names the arguments and shows an example.
func exactly(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		want := strings.Join(names, " ")
		if want == "" {
			want = "no argument"
		}
		return usageError(fmt.Errorf("%d arguments: want %s; see `%s --help`", len(args), want, c.CommandPath()))
	}
}

// splitService reads NAME or NAME.NAMESPACE.
func splitService(s string) (namespace, name string, err error) {
	name, namespace, dotted := strings.Cut(s, ".")
	if !dotted {
		namespace = "default"
	}
	if !isLabel(name) || !isLabel(namespace) {
		return "", "", usageError(fmt.Errorf("service %q: want NAME or NAME.NAMESPACE of lower-case letters, digits and dashes", s))
	}
	return namespace, name, nil
}

// isLabel says whether s is a DNS label (RFC 1123).
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, r := range s {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' {
			return false
		}
	}
	return true
}
