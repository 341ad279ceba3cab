package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
	"github.com/inlay-mesh/inlay/ebpf/load"
	"github.com/inlay-mesh/inlay/ebpf/proxy"
)

func nodeProbeCommand() *cobra.Command {
	var out format
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "Say which hooks of the node agent this kernel has, and why one is off",
		Long: `Load and attach each program of the node agent to a cgroup made for that, and say what the kernel
said. Nothing stays behind. Exit code 3 when a required one is off: there is no agent on this machine then.`,
		Example: "  sudo inlay node probe\n  sudo inlay node probe -o json",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := load.Check(); err != nil {
				return coded(err)
			}
			hooks := load.Probe()
			if err := printHooks(c, out, hooks); err != nil {
				return err
			}
			for _, h := range hooks {
				if h.Required && !h.On {
					return &exitError{exitUnsupported, fmt.Errorf("hook %s is required and off: %s", h.Name, h.Why)}
				}
			}
			return nil
		},
	}
	outputFlag(cmd, &out)
	return cmd
}

// hookState is a hook as -o json shows it. Field names are part of the interface.
type hookState struct {
	Name     string `json:"name"`
	On       bool   `json:"on"`
	Required bool   `json:"required"`
	Gives    string `json:"gives"`
	Since    string `json:"since"`
	Without  string `json:"without"`
	Why      string `json:"why"`
}

func printHooks(c *cobra.Command, out format, hooks []load.Hook) error {
	states := make([]hookState, len(hooks))
	for i, h := range hooks {
		states[i] = hookState{Name: h.Name, On: h.On, Required: h.Required, Gives: h.Gives, Since: h.Since, Without: h.Without, Why: h.Why}
	}
	if out != formatTable {
		return out.printValue(c.OutOrStdout(), states)
	}
	w := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "HOOK\tSTATE\tGIVES\tNOTE")
	for _, h := range states {
		state, note := "on", h.Why
		if !h.On {
			state = "off"
			if h.Required {
				state = "MISSING"
			} else if h.Without != "" {
				note += "; " + h.Without
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", h.Name, state, h.Gives, dash(note))
	}
	return w.Flush()
}

// pinFlags find the pins of a node agent.
type pinFlags struct{ cgroup, runDir string }

func (f *pinFlags) flags(c *cobra.Command) {
	c.Flags().StringVar(&f.cgroup, "cgroup", "", "the managed cgroup of the agent (default inlay)")
	c.Flags().StringVar(&f.runDir, "run-dir", "", "run directory of the node (default "+systemRun+")")
}

func (f *pinFlags) find() (cgroup, pin string, p places, err error) {
	if cgroup, err = load.ResolveCgroup(f.cgroup); err == nil {
		pin, err = load.PinDir(f.cgroup)
	}
	if err != nil {
		return "", "", places{}, coded(err)
	}
	p, err = placesFor(f.runDir, true)
	return cgroup, pin, p, err
}

// coded gives an error of the agent's rooms its exit code.
func coded(err error) error {
	var lacking *load.Unsupported
	switch {
	case err == nil:
		return nil
	case errors.As(err, &lacking):
		return &exitError{exitUnsupported, lacking}
	case errors.Is(err, load.ErrBusy):
		return &exitError{exitRunning, err}
	}
	return err
}

func nodeCleanupCommand() *cobra.Command {
	var f pinFlags
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Take the node agent's programs, maps and cgroups away",
		Long: `Detach every program of a node agent that has ended, remove its pins, stop its DNS proxy, and remove the
cgroups in which no process lives. Programs that still run there go on, outside of the mesh. It refuses
while the agent runs; a second time it finds nothing.`,
		Example: "  sudo inlay node cleanup\n  sudo inlay node cleanup --cgroup inlay-test",
		Args:    exactly(),
		RunE: func(c *cobra.Command, _ []string) error {
			if err := needRoot("pins are root's to remove"); err != nil {
				return err
			}
			cgroup, pin, p, err := f.find()
			if err != nil {
				return err
			}
			mine := ownProxy(pin, f)
			removed, err := load.Cleanup(pin)
			for _, name := range removed {
				fmt.Fprintln(c.OutOrStdout(), "removed", filepath.Join(pin, name))
			}
			if errors.Is(err, load.ErrBusy) {
				return coded(err) // nothing was touched, nor is anything else
			}
			stopped, e := stopProxy(c.Context(), p.proxySocket(), mine)
			if stopped {
				fmt.Fprintln(c.OutOrStdout(), "stopped the DNS proxy at", p.proxySocket())
			}
			err = errors.Join(err, e)
			gone, left, e := removeCgroups(cgroup)
			for _, dir := range gone {
				fmt.Fprintln(c.OutOrStdout(), "removed", dir)
			}
			for _, dir := range left {
				fmt.Fprintln(c.ErrOrStderr(), "left", dir+": processes live in it, which are outside of the mesh now")
			}
			return errors.Join(err, e)
		},
	}
	f.flags(cmd)
	return cmd
}

// ownProxy tells the DNS proxy of the agent that left these pins from that of another agent of this
// machine, which uses the same run directory by default.
func ownProxy(pin string, f pinFlags) func(proxy.Status) bool {
	maps, err := load.OpenMaps(pin)
	if err != nil { // no pins are left to compare with: the one in the directory that was named, or of the default agent
		return func(proxy.Status) bool { return f.runDir != "" || f.cgroup == "" }
	}
	defer func() { _ = maps.Close() }()
	id, err := proxy.MapID(maps)
	return func(s proxy.Status) bool { return err != nil || s.MapID == id }
}

// removeCgroups removes the managed cgroup and those below it, the deepest first, as far as they are
// empty.
func removeCgroups(root string) (gone, left []string, err error) {
	var dirs []string
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err == nil && d.IsDir():
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	for _, dir := range slices.Backward(dirs) {
		switch e := os.Remove(dir); {
		case e == nil:
			gone = append(gone, dir)
		case errors.Is(e, fs.ErrNotExist):
		case isBusy(e):
			if dir != root || len(left) == 0 {
				left = append(left, dir)
			}
		default:
			err = errors.Join(err, e)
		}
	}
	return gone, left, err
}

func nodeBreakglassCommand() *cobra.Command {
	var f pinFlags
	cmd := &cobra.Command{
		Use:   "breakglass [on|off]",
		Short: "Allow every connection of managed programs at once, whatever the policies say",
		Long: `With on, one write makes the programs in the kernel allow every connection of every managed program;
with off they decide by policy again. It works while the agent and the control plane are away. Addresses
and names go on as they were. The verb and the agent each write the change into their log, as a warning,
and the metric inlay_breakglass is 1; without an argument the verb says what holds now.`,
		Example: "  inlay node breakglass\n  sudo inlay node breakglass on\n  sudo inlay node breakglass off",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 || len(args) == 1 && args[0] != "on" && args[0] != "off" {
				return usageError(fmt.Errorf("breakglass %v: want on, off, or nothing to be told what holds", args))
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if err := needRoot("the switch is root's"); err != nil {
				return err
			}
			_, pin, _, err := f.find()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				on, err := breakglassState(pin)
				if err != nil {
					return err
				}
				fmt.Fprintln(c.OutOrStdout(), breakglassText(on))
				return nil
			}
			changed, err := load.Breakglass(pin, args[0] == "on")
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return &exitError{exitAbsent, err}
			case err != nil:
				return err
			}
			auditBreakglass(c, args[0], pin, changed)
			if !changed {
				fmt.Fprint(c.OutOrStdout(), "nothing changed: ")
			}
			fmt.Fprintln(c.OutOrStdout(), breakglassText(args[0] == "on"))
			return nil
		},
	}
	f.flags(cmd)
	return cmd
}

func breakglassText(on bool) string {
	if on {
		return "breakglass is on: every connection is allowed; back to the policies: inlay node breakglass off"
	}
	return "breakglass is off: the policies decide"
}

// breakglassState reads the switch.
func breakglassState(pin string) (bool, error) {
	maps, err := load.OpenMaps(pin)
	if errors.Is(err, fs.ErrNotExist) {
		return false, &exitError{exitAbsent, err}
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = maps.Close() }()
	var s bpfobj.InlaySettings
	if err := maps.SettingsMap.Lookup(uint32(0), &s); err != nil {
		return false, fmt.Errorf("pinned map %s: %w", bpfobj.InlayMapSettingsMap, err)
	}
	return s.AllowAll != 0, nil
}

// auditBreakglass writes who turned the switch, beside what the agent itself writes about it.
func auditBreakglass(c *cobra.Command, to, pin string, changed bool) {
	log := (&logFlags{}).logger(c.ErrOrStderr())
	log.WarnContext(c.Context(), "breakglass", "to", to, "changed", changed, "pin", pin,
		"uid", os.Getuid(), "sudo_uid", os.Getenv("SUDO_UID"), "sudo_user", os.Getenv("SUDO_USER"))
}
