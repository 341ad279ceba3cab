package load

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Sweep runs the iterators once over every live socket and returns when they are through: they judge
// managed sockets again, end those of endpoints that are gone, make samples and adopt what is older
// than the agent. An iterator sees the network namespace of the thread that opens it, so they run in
// that of the agent and in each one that a managed process is in. A namespace that cannot be
// entered does not keep the others from being swept. Sweeps do not overlap.
func (s *Set) Sweep() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return os.ErrClosed
	}
	var iters []*link.Iter
	var names []string
	for _, l := range s.progs {
		if it, ok := s.links[l.Name].(*link.Iter); ok {
			iters, names = append(iters, it), append(names, l.Name)
		}
	}
	run := func() error {
		var faults []error
		for i, it := range iters {
			if err := drain(it); err != nil {
				faults = append(faults, fmt.Errorf("%s: %w", names[i], err))
			}
		}
		return errors.Join(faults...)
	}
	spaces, err := namespaces(s.cfg.Cgroup)
	faults := []error{err, run()}
	for ino, pid := range spaces {
		if ino == uint64(s.netnsIno) {
			continue
		}
		if err := inNamespace(pid, ino, run); err != nil {
			faults = append(faults, fmt.Errorf("sweep network namespace %d of process %d: %w", ino, pid, err))
		}
	}
	return errors.Join(faults...)
}

// drain reads an iterator to its end, which is what makes its program run for every socket.
func drain(it *link.Iter) error {
	r, err := it.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	for {
		_, err := io.Copy(io.Discard, r)
		// One read visits at most 1,000,000 sockets, and answers EAGAIN when the program wrote nothing
		// about them (MAX_ITER_OBJECTS, kernel/bpf/bpf_iter.c): the next one goes on from there.
		if !errors.Is(err, unix.EAGAIN) {
			return err
		}
	}
}

// namespaces returns the network namespaces that processes of a cgroup and those below it are in: inode
// number to one of the processes.
func namespaces(cgroup string) (map[uint64]int, error) {
	found := make(map[uint64]int)
	err := filepath.WalkDir(cgroup, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // went while it was looked at
			return nil
		}
		if err != nil || !d.IsDir() {
			return err
		}
		list, err := os.Open(filepath.Join(path, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer list.Close()
		lines := bufio.NewScanner(list)
		for lines.Scan() {
			pid, err := strconv.Atoi(lines.Text())
			if err != nil || pid == 0 { // "0" stands for a process of another PID namespace
				continue
			}
			var st unix.Stat_t
			if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) == nil { // else it just ended
				found[st.Ino] = pid
			}
		}
		// "Reading cgroup.procs in a threaded cgroup ... fails with EOPNOTSUPP" (cgroup-v2): its processes
		// are listed in the cgroup above it.
		if err := lines.Err(); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENODEV) {
			return err
		}
		return nil
	})
	if err != nil {
		return found, fmt.Errorf("processes of cgroup %s: %w", cgroup, err)
	}
	return found, nil
}

// inNamespace runs f on a thread of its own in the network namespace of a process. That the process is
// gone is no fault: so are its sockets, or they are seen with another one's.
func inNamespace(pid int, ino uint64, f func() error) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &st); err != nil {
		return err
	}
	if st.Ino != ino { // the number belongs to another process by now
		return nil
	}
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so no other one wakes up in that namespace.
		runtime.LockOSThread()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}
