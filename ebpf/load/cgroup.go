package load

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// DefaultRoot is the name of the managed cgroup below the cgroup2 mount.
const DefaultRoot = "inlay"

// FindCgroup2 returns where the cgroup2 hierarchy is mounted: /sys/fs/cgroup, or beside the version 1
// controllers in hybrid mode. Without any it returns an *[Unsupported].
func FindCgroup2() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", &Unsupported{Missing: "/proc", Remedy: "mount it: mount -t proc proc /proc", Err: err}
	}
	defer f.Close()
	return findCgroup2(f)
}

// findCgroup2 picks from the lines of mountinfo: a mount of the whole hierarchy before one of a part
// of it, a writable one before a read-only one, then the first.
func findCgroup2(mountinfo io.Reader) (string, error) {
	best, bestRank := "", -1
	lines := bufio.NewScanner(mountinfo)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		m, ok := parseMount(lines.Text())
		if !ok || m.fstype != "cgroup2" {
			continue
		}
		rank := 0
		if m.root == "/" {
			rank += 2
		}
		if !m.readOnly {
			rank++
		}
		if rank > bestRank {
			best, bestRank = m.point, rank
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("read mountinfo: %w", err)
	}
	if best == "" {
		return "", &Unsupported{
			Missing: "a cgroup2 mount", Found: "none in /proc/self/mountinfo",
			Remedy: "mount one: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
		}
	}
	return best, nil
}

type mount struct {
	root, point, fstype string
	readOnly            bool
}

// parseMount reads one line of mountinfo: "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3
// /dev/root rw,errors=continue" (proc_pid_mountinfo(5)); zero or more optional fields end at "-".
func parseMount(line string) (mount, bool) {
	left, right, ok := strings.Cut(line, " - ")
	if !ok {
		return mount{}, false
	}
	f, g := strings.Fields(left), strings.Fields(right)
	if len(f) < 6 || len(g) < 1 {
		return mount{}, false
	}
	m := mount{root: unescape(f[3]), point: unescape(f[4]), fstype: g[0]}
	for o := range strings.SplitSeq(f[5], ",") {
		m.readOnly = m.readOnly || o == "ro"
	}
	return m, true
}

// unescape undoes the octal escapes that mountinfo has for space, tab, newline and backslash.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && octal(s[i+1]) && octal(s[i+2]) && octal(s[i+3]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func octal(c byte) bool { return c >= '0' && c <= '7' }

// ResolveCgroup turns what an operator named into the absolute path of the managed cgroup: empty is
// [DefaultRoot], a relative path is below the cgroup2 mount, an absolute one must be. It does not
// create the cgroup. A path elsewhere has no cgroup2 (*[Unsupported]). The mount itself is refused: it
// holds every process of the machine.
func ResolveCgroup(name string) (string, error) {
	mnt, err := FindCgroup2()
	if err != nil {
		return "", err
	}
	return resolveCgroup(mnt, name)
}

func resolveCgroup(mnt, name string) (string, error) {
	if name == "" {
		name = DefaultRoot
	}
	p := name
	if !filepath.IsAbs(p) {
		p = filepath.Join(mnt, p)
	}
	p = filepath.Clean(p)
	rel, err := filepath.Rel(mnt, p)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", &Unsupported{
			Missing: fmt.Sprintf("cgroup2 at %q", name), Found: "not below the cgroup2 mount " + mnt,
			Remedy: "name a path below it, or one relative to it", Err: nil,
		}
	}
	if rel == "." {
		return "", fmt.Errorf("cgroup %q: is the cgroup2 mount itself, which holds every process: want a cgroup below %s", name, mnt)
	}
	return p, nil
}

// CgroupID returns the number that programs know a cgroup by (bpf_get_current_cgroup_id).
func CgroupID(dir string) (uint64, error) {
	// The handle of a directory of cgroup2 is its 64-bit id (kernfs), on machines of 32 bits too,
	// where the inode number is cut.
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("id of cgroup %s: %w", dir, err)
	}
	h, _, err := unix.NameToHandleAt(unix.AT_FDCWD, dir, 0)
	if err != nil {
		return 0, fmt.Errorf("id of cgroup %s: %w", dir, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC || h.Size() != 8 {
		return 0, fmt.Errorf("id of cgroup %s: not a directory of cgroup2", dir)
	}
	return binary.NativeEndian.Uint64(h.Bytes()), nil
}

// ensureCgroup creates the managed cgroup, with those above it.
func ensureCgroup(dir string) error {
	var st unix.Statfs_t
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		err = unix.Statfs(dir, &st)
	}
	switch {
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return &Unsupported{Missing: "write access to the cgroup2 mount", Found: dir, Remedy: remedyRoot + " outside of containers", Err: err}
	case err != nil:
		return fmt.Errorf("create cgroup %s: %w", dir, err)
	case st.Type != unix.CGROUP2_SUPER_MAGIC:
		return fmt.Errorf("cgroup %s: not on a cgroup2 file system: give a path below the mount that /proc/self/mountinfo names cgroup2", dir)
	}
	return nil
}

// cgroupLevel tells how deep dir lies below the root of the whole hierarchy, which is level 0. Helpers
// like bpf_get_current_ancestor_cgroup_id count from there, also when this process lives in a cgroup
// namespace that hides the upper levels: so the kernel is asked where a cgroup that this process can
// name lies, and the rest is counted.
func cgroupLevel(dir string) (int, error) {
	mnt, err := FindCgroup2()
	if err != nil {
		return 0, err
	}
	rel, err := filepath.Rel(mnt, dir)
	if err != nil {
		return 0, fmt.Errorf("level of cgroup %s: %w", dir, err)
	}
	below := 0
	if rel != "." {
		below = len(strings.Split(rel, "/"))
	}
	chain, err := ancestors()
	if err != nil {
		return 0, fmt.Errorf("level of cgroup %s: %w", dir, err)
	}
	top, err := CgroupID(mnt)
	if err != nil {
		return 0, err
	}
	for level, id := range chain {
		if id == top {
			return level + below, nil
		}
	}
	return 0, fmt.Errorf("level of cgroup %s: this process is in a cgroup outside of %s: start it below, or mount cgroup2 here: mount -t cgroup2 cgroup2 %s", dir, mnt, mnt)
}

// maxDepth bounds how deep this process may lie.
const maxDepth = 32

// ancestors returns the ids of the cgroups that this process is in, from level 0 down. A program that
// is run once in this process's context asks for them.
func ancestors() ([]uint64, error) {
	ids, err := ebpf.NewMap(&ebpf.MapSpec{Name: "inlay_levels", Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: maxDepth})
	if err != nil {
		return nil, fmt.Errorf("create map: %w", err)
	}
	defer ids.Close()
	var ins asm.Instructions
	for level := range int32(maxDepth) {
		ins = append(ins,
			asm.Mov.Imm(asm.R1, level),
			asm.FnGetCurrentAncestorCgroupId.Call(),
			asm.StoreMem(asm.RFP, -8, asm.R0, asm.DWord),
			asm.StoreImm(asm.RFP, -12, int64(level), asm.Word),
			asm.LoadMapPtr(asm.R1, ids.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -12),
			asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, -8),
			asm.Mov.Imm(asm.R4, 0),
			asm.FnMapUpdateElem.Call(),
		)
	}
	ins = append(ins, asm.Mov.Imm(asm.R0, 0), asm.Return())
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "inlay_levels", Type: ebpf.RawTracepoint, License: "Dual MIT/GPL", Instructions: ins})
	if err != nil {
		return nil, fmt.Errorf("load program: %w", err)
	}
	defer prog.Close()
	if _, err := prog.Run(&ebpf.RunOptions{}); err != nil {
		return nil, fmt.Errorf("run program: %w", err)
	}
	var chain []uint64
	for level := range uint32(maxDepth) {
		var id uint64
		if err := ids.Lookup(level, &id); err != nil {
			return nil, fmt.Errorf("read level %d: %w", level, err)
		}
		if id == 0 { // "ancestor_level ... not found: 0" (bpf-helpers(7))
			break
		}
		chain = append(chain, id)
	}
	return chain, nil
}

// rootName is the name of a managed cgroup within a pin directory's name. bpffs refuses dots in names
// ("Dots in names (e.g. "/sys/fs/bpf/foo.bar") are reserved for future use", kernel/bpf/inode.c), so
// what is no letter, digit or dash is written as _ and two hexadecimal digits.
func rootName(rel string) string {
	var b strings.Builder
	for _, c := range []byte(path.Clean(rel)) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "_%02x", c)
		}
	}
	return b.String()
}
