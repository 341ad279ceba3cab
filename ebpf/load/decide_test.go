package load

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

func TestFindCgroup2(t *testing.T) {
	const (
		hybrid = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n" +
			"32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n" +
			"41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
		unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 master:9 - cgroup2 cgroup2 rw,nsdelegate\n"
		part    = "50 23 0:26 /a/b /mnt/part rw - cgroup2 cgroup2 rw\n"
		readOny = "51 23 0:26 / /mnt/ro ro,nosuid - cgroup2 cgroup2 rw\n"
		spaces  = `52 23 0:26 / /mnt/two\040words\134x rw - cgroup2 cgroup2 rw` + "\n"
	)
	for name, tc := range map[string]struct{ mountinfo, want string }{
		"hybrid mode":                        {hybrid, "/sys/fs/cgroup/unified"},
		"version 2 alone":                    {unified, "/sys/fs/cgroup"},
		"the whole before a part":            {part + unified, "/sys/fs/cgroup"},
		"a part when there is no whole":      {part, "/mnt/part"},
		"a writable one before a read-only":  {readOny + unified, "/sys/fs/cgroup"},
		"the first of two that are the same": {unified + hybrid, "/sys/fs/cgroup"},
		"escapes are undone":                 {spaces, `/mnt/two words\x`},
		"lines that are cut are passed over": {"41 31 0:38 / - cgroup2\n - \n41 31 0:38 / /x rw - \n" + unified, "/sys/fs/cgroup"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := findCgroup2(strings.NewReader(tc.mountinfo))
			if err != nil || got != tc.want {
				t.Errorf("findCgroup2 = %q, %v; want %q", got, err, tc.want)
			}
		})
	}
	_, err := findCgroup2(strings.NewReader("32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"))
	u, ok := errors.AsType[*Unsupported](err)
	if !ok {
		t.Fatalf("without cgroup2: %v, want *Unsupported", err)
	}
	if strings.Contains(u.Error(), "\n") || !strings.Contains(u.Error(), "mount -t cgroup2") {
		t.Errorf("%q: want one line with the next command", u)
	}
}

func FuzzMountinfo(f *testing.F) {
	f.Add("41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n")
	f.Add(`52 23 0:26 / /mnt/two\040words\13 rw - cgroup2 x`)
	f.Fuzz(func(t *testing.T, s string) {
		got, err := findCgroup2(strings.NewReader(s))
		if err == nil && got == "" {
			t.Errorf("findCgroup2(%q): neither a mount nor an error", s)
		}
	})
}

func TestResolveCgroup(t *testing.T) {
	const mnt = "/sys/fs/cgroup/unified"
	for name, tc := range map[string]struct{ in, want, fault string }{
		"the default":                     {"", mnt + "/inlay", ""},
		"a name is below the mount":       {"inlay-demo-7", mnt + "/inlay-demo-7", ""},
		"a path below the mount":          {mnt + "/a/b/", mnt + "/a/b", ""},
		"the mount itself is refused":     {mnt, "", "is the cgroup2 mount itself"},
		"the mount by a dot is refused":   {".", "", "is the cgroup2 mount itself"},
		"above the mount is refused":      {"../x", "", "not below the cgroup2 mount"},
		"a path elsewhere is refused":     {"/sys/fs/cgroup/cpu/x", "", "not below the cgroup2 mount"},
		"a name that starts alike is not": {mnt + "x/y", "", "not below the cgroup2 mount"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := resolveCgroup(mnt, tc.in)
			if got != tc.want || (err == nil) != (tc.fault == "") || err != nil && !strings.Contains(err.Error(), tc.fault) {
				t.Errorf("resolveCgroup(%q) = %q, %v; want %q, fault %q", tc.in, got, err, tc.want, tc.fault)
			}
		})
	}
}

func TestPinNamesHoldNoDot(t *testing.T) {
	for in, want := range map[string]string{"inlay-demo-7": "inlay-demo-7", "a.b": "a_2eb", "a/b": "a_2fb", "a_2eb": "a_5f2eb"} {
		if got := rootName(in); got != want {
			t.Errorf("rootName(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestMissingCapabilities(t *testing.T) {
	bit := func(bits ...int) (set uint64) {
		for _, b := range bits {
			set |= 1 << b
		}
		return set
	}
	for name, tc := range map[string]struct {
		set  uint64
		want string
	}{
		"none":                      {0, "missing CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON"},
		"one is not enough":         {bit(unix.CAP_BPF, unix.CAP_NET_ADMIN), "missing CAP_PERFMON"},
		"the three":                 {bit(unix.CAP_BPF, unix.CAP_NET_ADMIN, unix.CAP_PERFMON), ""},
		"the administrator's alone": {bit(unix.CAP_SYS_ADMIN), ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := missingCapabilities(tc.set)
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want+";") {
				t.Errorf("missingCapabilities(%#x) = %v, want %q", tc.set, err, tc.want)
			}
		})
	}
}

func TestOldKernelsAreToldByWhatTheyLack(t *testing.T) {
	lack := feature{"ring buffers of tomorrow", "9.9", func() error { return fmt.Errorf("x: %w", ebpf.ErrNotSupported) }}
	jailed := feature{"anything", "1.0", func() error { return unix.EPERM }}
	have := feature{"that", "1.0", func() error { return nil }}
	if err := checkFeatures([]feature{have}); err != nil {
		t.Errorf("all there: %v", err)
	}
	for want, f := range map[string]feature{"ring buffers of tomorrow (Linux 9.9)": lack, "permission to load programs": jailed} {
		err := checkFeatures([]feature{have, f})
		u, ok := errors.AsType[*Unsupported](err)
		if !ok || u.Missing != want || strings.Contains(err.Error(), "\n") {
			t.Errorf("checkFeatures = %v, want one line about %q", err, want)
		}
	}
}

func TestMapSizes(t *testing.T) {
	_, err := mapSpecs(map[string]uint32{"nosuch": 5, "services": 0, "sockets": 9, "events": 4095, "counters": 1, "slots": 77})
	if err == nil {
		t.Fatal("bad sizes were accepted")
	}
	for _, want := range []string{`"nosuch": no such map: want one of addresses`, `"services": 0: want at least 1`, `"sockets": it lives in the sockets`, `"events": 4095 bytes: want a power of two`, `"counters": 1: want at least 32`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v: want %q", err, want)
		}
	}
	specs, err := mapSpecs(map[string]uint32{"slots": 77})
	if err != nil || specs["slots"].MaxEntries != 77 || specs["services"].MaxEntries != 1048576 {
		t.Errorf("mapSpecs: %v, slots %v, services %v", err, specs["slots"], specs["services"])
	}
}

// The number of the layout is written twice, in C and in Go.
func TestLayoutIsThatOfTheHeader(t *testing.T) {
	src, err := os.ReadFile("../bpf/types.h")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^#define LAYOUT (\d+)$`).FindSubmatch(src)
	if m == nil || string(m[1]) != Layout {
		t.Errorf("types.h says LAYOUT %s, Layout is %s", m, Layout)
	}
}

func TestHooksAreWhole(t *testing.T) {
	seen := make(map[string]bool)
	for _, h := range hooks {
		if seen[h.Name] || h.Gives == "" || h.Since == "" || h.Required == (h.Without != "") || strings.ContainsAny(h.Name, ".") {
			t.Errorf("hook %+v: named twice, with a dot, or not told whole", h.Hook)
		}
		seen[h.Name] = true
		if h.place == atCgroup && h.attach == ebpf.AttachNone && h.Name != "ingress" {
			t.Errorf("hook %s: no attach type", h.Name)
		}
	}
}
