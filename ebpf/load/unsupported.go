package load

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// Unsupported says in one line why this machine, or this process on it, cannot run the programs.
// It is no fault of configuration: a caller may go on without programs, or exit with code 3.
type Unsupported struct {
	Missing string // what is missing: "a cgroup2 mount", "CAP_BPF"
	Found   string // what there is instead; empty when nothing is worth telling
	Remedy  string // the next command, or what to do
	Err     error  // the kernel's answer; nil when it was not asked
}

// Error is one line.
func (u *Unsupported) Error() string {
	var b strings.Builder
	b.WriteString("eBPF is not available: missing " + u.Missing)
	if u.Found != "" {
		b.WriteString(" (" + u.Found + ")")
	}
	if u.Err != nil {
		b.WriteString(": " + oneLine(u.Err))
	}
	if u.Remedy != "" {
		b.WriteString("; " + u.Remedy)
	}
	return b.String()
}

// Unwrap gives the kernel's answer.
func (u *Unsupported) Unwrap() error { return u.Err }

// btfPath is where a kernel shows the types it was built from.
const btfPath = "/sys/kernel/btf/vmlinux"

// Check reports whether programs can be loaded here at all, as *[Unsupported] when not: privileges,
// cgroup2, BTF and what a kernel before 6.1 lacks. It asks the kernel by small loads and never
// compares version strings, since distributions carry features back. It leaves nothing behind.
func Check() error {
	if err := checkCapabilities(); err != nil {
		return err
	}
	if _, err := FindCgroup2(); err != nil {
		return err
	}
	if _, err := os.Stat(btfPath); err != nil {
		return &Unsupported{
			Missing: "BTF of the kernel", Found: "no " + btfPath,
			Remedy: "use a kernel built with CONFIG_DEBUG_INFO_BTF=y", Err: nil,
		}
	}
	return checkFeatures(required)
}

// capability is one bit of the effective set.
type capability struct {
	bit  int
	name string
}

// checkCapabilities wants what loading and attaching needs. CAP_SYS_ADMIN stands for all three:
// "CAP_BPF ... was added in Linux 5.8 to separate out BPF functionality from the overloaded
// CAP_SYS_ADMIN capability" (capabilities(7)).
func checkCapabilities() error {
	var data [2]unix.CapUserData // 64 bits in two words since version 3
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return &Unsupported{Missing: "privileges", Remedy: remedyRoot, Err: err}
	}
	return missingCapabilities(uint64(data[0].Effective) | uint64(data[1].Effective)<<32)
}

const remedyRoot = "run as root (sudo), or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"

func missingCapabilities(effective uint64) error {
	if effective&(1<<unix.CAP_SYS_ADMIN) != 0 {
		return nil
	}
	var missing []string
	for _, c := range []capability{
		{unix.CAP_BPF, "CAP_BPF"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_PERFMON, "CAP_PERFMON"},
	} {
		if effective&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return &Unsupported{Missing: strings.Join(missing, ", "), Remedy: remedyRoot}
}

// feature is something of the kernel that a required program cannot do without.
type feature struct {
	what, since string
	have        func() error // nil, ebpf.ErrNotSupported, or why it cannot be said
}

var required = []feature{
	{"sk_storage", "5.2", func() error { return features.HaveMapType(ebpf.SkStorage) }},
	{"BPF ring buffers", "5.8", func() error { return features.HaveMapType(ebpf.RingBuf) }},
	{"cgroup identity of a socket in cgroup_skb", "5.8", func() error {
		return features.HaveProgramHelper(ebpf.CGroupSKB, asm.FnSkAncestorCgroupId)
	}},
	{"cookies of network namespaces in sockops", "5.15", func() error {
		return features.HaveProgramHelper(ebpf.SockOps, asm.FnGetNetnsCookie)
	}},
	{"errno of a refused connect() chosen by a program", "5.18", func() error {
		return features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval)
	}},
}

// checkFeatures reports the first missing one.
func checkFeatures(list []feature) error {
	for _, f := range list {
		err := f.have()
		switch {
		case err == nil:
		case errors.Is(err, ebpf.ErrNotSupported):
			return &Unsupported{
				Missing: fmt.Sprintf("%s (Linux %s)", f.what, f.since), Found: "kernel " + release(),
				Remedy: "use Linux 6.1 or newer",
			}
		case errors.Is(err, unix.EPERM):
			return &Unsupported{
				Missing: "permission to load programs",
				Found:   "the capabilities are those of a user namespace, or the kernel is locked down",
				Remedy:  remedyRoot + " outside of containers", Err: err,
			}
		default:
			return fmt.Errorf("probe %s: %w", f.what, err)
		}
	}
	return nil
}

// release is the kernel's own name for itself, for people to read.
func release() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// oneLine joins the lines of a verifier's answer.
func oneLine(err error) string {
	lines := strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' || r == '\r' })
	for i, l := range lines {
		lines[i] = strings.Join(strings.Fields(l), " ")
	}
	return strings.Join(lines, "; ")
}
