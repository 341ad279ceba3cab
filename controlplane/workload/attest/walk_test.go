package attest_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/inlay-mesh/inlay/controlplane/workload/attest"
)

// table is a process table that a test changes between two readings.
type table struct {
	now   map[int]attest.Stat
	reads int
	// before is called ahead of each reading, with its number from 1.
	before func(n int)
}

func (t *table) Stat(pid int) (attest.Stat, error) {
	t.reads++
	if t.before != nil {
		t.before(t.reads)
	}
	s, ok := t.now[pid]
	if !ok {
		return attest.Stat{}, fmt.Errorf("process %d: %w", pid, attest.ErrNoProcess)
	}
	return s, nil
}

func (t *table) set(pid int, start uint64, ppid int) {
	if t.now == nil {
		t.now = make(map[int]attest.Stat)
	}
	t.now[pid] = attest.Stat{Process: attest.Process{PID: pid, StartTime: start}, PPID: ppid, UID: 1000}
}

func pids(chain []attest.Stat) string {
	s := ""
	for _, p := range chain {
		s += fmt.Sprintf("%d@%d ", p.PID, p.StartTime)
	}
	return s
}

// family is init 1 - root 10 - shell 20 - program 30.
func family() *table {
	t := &table{}
	t.set(1, 1, 0)
	t.set(10, 100, 1)
	t.set(20, 200, 10)
	t.set(30, 300, 20)
	return t
}

func TestWalkFindsTheAncestors(t *testing.T) {
	chain, err := attest.Walk(family(), attest.Process{PID: 30, StartTime: 300})
	if err != nil || pids(chain) != "30@300 20@200 10@100 1@1 " {
		t.Errorf("%s, %v", pids(chain), err)
	}
}

func TestWalkNeverTakesAReusedNumber(t *testing.T) {
	p := attest.Process{PID: 30, StartTime: 300}
	t.Run("the process itself was reused before", func(t *testing.T) {
		tab := family()
		tab.set(30, 999, 20)
		if _, err := attest.Walk(tab, p); !errors.Is(err, attest.ErrNoProcess) {
			t.Errorf("error %v, want ErrNoProcess", err)
		}
	})
	t.Run("the process has ended", func(t *testing.T) {
		tab := family()
		delete(tab.now, 30)
		if _, err := attest.Walk(tab, p); !errors.Is(err, attest.ErrNoProcess) {
			t.Errorf("error %v, want ErrNoProcess", err)
		}
	})
	// Whatever happens between two readings, the answer is right for some moment or an error.
	for at := 2; at <= 8; at++ {
		t.Run(fmt.Sprintf("the process is reused before reading %d", at), func(t *testing.T) {
			tab := family()
			tab.before = func(n int) {
				if n == at {
					tab.set(30, 999, 1)
				}
			}
			chain, err := attest.Walk(tab, p)
			// Its own start time is compared again after its ancestors were read, at reading 5.
			if at <= 5 && !errors.Is(err, attest.ErrNoProcess) {
				t.Errorf("%s, %v; want ErrNoProcess", pids(chain), err)
			}
		})
		t.Run(fmt.Sprintf("the parent ends and a stranger gets its number before reading %d", at), func(t *testing.T) {
			tab := family()
			tab.set(66, 50, 1) // the stranger's parent
			tab.before = func(n int) {
				if n == at {
					tab.set(20, 999, 66) // not the shell any more
					tab.set(30, 300, 10) // the orphan goes to the subreaper
				}
			}
			chain, err := attest.Walk(tab, p)
			if err != nil {
				t.Fatal(err)
			}
			got := pids(chain)
			old, now := "30@300 20@200 10@100 1@1 ", "30@300 10@100 1@1 "
			if got != now && (got != old || at <= 5) {
				t.Errorf("%s, want %s: the stranger is nobody's parent", got, now)
			}
		})
	}
	t.Run("a tree that never rests is an error", func(t *testing.T) {
		tab := family()
		tab.before = func(n int) { tab.set(20, uint64(1000+n), 10) }
		if chain, err := attest.Walk(tab, p); err == nil {
			t.Errorf("%s, want an error", pids(chain))
		}
	})
	t.Run("a table in a circle ends", func(t *testing.T) {
		tab := &table{}
		tab.set(2, 1, 3)
		tab.set(3, 1, 2)
		if _, err := attest.Walk(tab, attest.Process{PID: 2, StartTime: 1}); err == nil {
			t.Error("want an error")
		}
	})
}

func procDir(t *testing.T, pid int, stat, status string) attest.Proc {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, strconv.Itoa(pid))
	if err := errors.Join(os.Mkdir(dir, 0o755),
		os.WriteFile(filepath.Join(dir, "stat"), []byte(stat), 0o600),
		os.WriteFile(filepath.Join(dir, "status"), []byte(status), 0o600)); err != nil {
		t.Fatal(err)
	}
	return attest.Proc{Root: root}
}

func TestProcReadsAnyCommand(t *testing.T) {
	const rest = " S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 1 2 3\n"
	const status = "Name:\tx\nUid:\t1000\t1001\t1002\t1003\nGid:\t0\t0\t0\t0\n"
	for name, command := range map[string]string{
		"plain": "(cart)", "parentheses": "(a) S 1 (b)", "only closing": "()))))", "spaces and a fake field": "(x) R 1 1 (y z)", "a line break": "(a\nb)",
	} {
		t.Run(name, func(t *testing.T) {
			s, err := procDir(t, 42, "42 "+command+rest, status).Stat(42)
			want := attest.Stat{Process: attest.Process{PID: 42, StartTime: 12345}, PPID: 7, UID: 1001}
			if err != nil || s != want {
				t.Errorf("%+v, %v; want %+v", s, err, want)
			}
		})
	}
	for name, files := range map[string][2]string{
		"an empty file":     {"", status},
		"too few fields":    {"42 (a) S 7 42", status},
		"a parent in words": {"42 (a) S x 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 1", status},
		"another process":   {"43 (a)" + rest, status},
		"no user":           {"42 (a)" + rest, "Name:\tx\n"},
		"a negative user":   {"42 (a)" + rest, "Uid:\t-1\t-1\t-1\t-1\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := procDir(t, 42, files[0], files[1]).Stat(42); err == nil {
				t.Errorf("%+v, want an error", s)
			}
		})
	}
	if _, err := (attest.Proc{}).Stat(-1); !errors.Is(err, attest.ErrNoProcess) {
		t.Errorf("process -1: %v, want ErrNoProcess", err)
	}
}

func FuzzProc(f *testing.F) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Skip("no /proc")
	}
	f.Add(own, []byte("Uid:\t1\t1\t1\t1\n"))
	f.Fuzz(func(t *testing.T, stat, status []byte) {
		s, err := procDir(t, 42, string(stat), string(status)).Stat(42)
		if err == nil && (s.PID != 42 || s.PPID < 0) {
			t.Errorf("accepted %+v", s)
		}
	})
}
