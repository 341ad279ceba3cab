package load

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// Config says where programs are attached and pinned.
type Config struct {
	// Cgroup is the managed cgroup: a path below the cgroup2 mount, or a name relative to it.
	// Empty means [DefaultRoot]. It is created when missing.
	Cgroup string
	// Pin is the directory for pins, on a bpf file system. Empty means [PinDir] of the cgroup.
	Pin string
	// Layout is the version of the maps' shapes: digits. Empty means the compiled one, [Layout].
	Layout string
	// MapSizes sets how many entries a map has, by name, where it is created (bytes for events). Nil
	// leaves the compiled sizes; a pinned map keeps the size it has.
	MapSizes map[string]uint32
	// Stats turns on the kernel's statistics of BPF programs while the Set is open. They cost about
	// 20 ns a run, of all programs of the machine.
	Stats bool
	// DNSStale is how old the heartbeat of a DNS proxy may be. Zero means two seconds: less, and a proxy that
	// waits for a busy processor is taken for dead, and programs hear NXDOMAIN about the mesh.
	DNSStale time.Duration
	// SampleAfter is how long after its begin, or its last sample, a connection gets a sample by Sweep.
	// Zero leaves the compiled one, 9 s.
	SampleAfter time.Duration
	// Handover is called during a change of layout, when the new programs run and before what the old
	// ones used is removed: the agent brings the DNS proxy to the new maps. An error of it undoes the
	// change. Nil does nothing.
	Handover func(*bpfobj.InlayMaps) error
	Log      *slog.Logger // nil discards
}

// complete fills defaults and checks.
func (c Config) complete() (Config, error) {
	root, err := ResolveCgroup(c.Cgroup)
	if err != nil {
		return c, err
	}
	if c.Pin == "" {
		if c.Pin, err = PinDir(c.Cgroup); err != nil {
			return c, err
		}
	}
	c.Cgroup, c.Pin = root, filepath.Clean(c.Pin)
	if c.Layout == "" {
		c.Layout = Layout
	}
	if strings.Trim(c.Layout, "0123456789") != "" {
		return c, fmt.Errorf("layout %q: want digits", c.Layout)
	}
	if c.DNSStale < 0 || c.SampleAfter < 0 {
		return c, fmt.Errorf("age of a stale DNS heartbeat %v, time between samples %v: want positive durations", c.DNSStale, c.SampleAfter)
	}
	if c.DNSStale == 0 {
		c.DNSStale = 2 * time.Second
	}
	c.Log = discard(c.Log)
	return c, nil
}

// Set is the attached programs of one managed cgroup. Its methods are safe for concurrent use.
type Set struct {
	cfg   Config
	maps  *bpfobj.InlayMaps
	hooks []Hook
	progs []loaded
	links map[string]link.Link
	lock  *os.File
	stats io.Closer // nil unless Config.Stats

	netnsIno uint32 // network namespace of the agent

	mu     sync.Mutex // held while the iterators run, and by Close
	closed bool
}

// Open loads the programs, attaches them to the managed cgroup and pins maps and links. What an agent
// before left pinned is taken over: maps of the same layout come as they are, and each program is
// replaced in one step, so that no connection passes between. Maps of another layout are left to
// their programs until new ones are filled and attached, and dropped last.
//
// fill is called with the maps that the programs will use, when the kernel has accepted the programs
// and before one is attached or replaced. The maps are those of [Set.Maps].
//
// An optional hook that the kernel refuses is left out (see [Set.Hooks]); when a required one is
// refused, or fill fails, Open fails and what was attached before goes on untouched. A process that
// dies within Open leaves what the next Open repairs. Errors: *[Unsupported], [ErrBusy] when another
// agent holds the pin directory.
func Open(cfg Config, fill func(*bpfobj.InlayMaps) error) (*Set, error) {
	if err := Check(); err != nil {
		return nil, err
	}
	return open(cfg, fill, parts{hooks: hooks, objects: objects})
}

// errKilled marks a fault that stands for the death of the process.
type errKilled struct{ error }

// opener is one run of Open.
type opener struct {
	parts  parts
	cfg    Config
	log    *slog.Logger
	layout string
	target *target
	links  map[string]link.Link
	apart  bool // the old programs of another layout write into maps that the new ones do not read

	undos   []func() error // newest last
	commits []func() error // what goes when all went well
	closers []io.Closer
}

func (o *opener) undo(f func() error)    { o.undos = append(o.undos, f) }
func (o *opener) commit(f func() error)  { o.commits = append(o.commits, f) }
func (o *opener) closeLater(c io.Closer) { o.closers = append(o.closers, c) }

// step lets a test end the process before what name says.
func (o *opener) step(name string) error {
	if o.parts.step == nil {
		return nil
	}
	if err := o.parts.step(name); err != nil {
		return errKilled{err}
	}
	return nil
}

func open(cfg Config, fill func(*bpfobj.InlayMaps) error, p parts) (s *Set, err error) {
	cfg, err = cfg.complete()
	if err != nil {
		return nil, err
	}
	o := &opener{parts: p, cfg: cfg, log: cfg.Log, layout: cfg.Layout, links: make(map[string]link.Link)}
	defer func() {
		if err != nil {
			err = o.rollback(err)
		}
		for _, c := range o.closers {
			c.Close()
		}
	}()
	return o.run(fill)
}

// rollback undoes what was done, newest first. A dead process undoes nothing.
func (o *opener) rollback(cause error) error {
	if _, dead := errors.AsType[errKilled](cause); !dead {
		for _, f := range slices.Backward(o.undos) {
			if err := f(); err != nil {
				o.log.Warn("undo failed", "err", err)
			}
		}
	}
	for _, l := range o.links {
		l.Close()
	}
	return cause
}

func (o *opener) run(fill func(*bpfobj.InlayMaps) error) (*Set, error) {
	cfg := o.cfg
	if err := o.prepare(); err != nil {
		return nil, err
	}
	lock, err := lockPins(cfg.Pin)
	if err != nil {
		return nil, err
	}
	keep := false
	defer func() {
		if !keep {
			lock.Close()
		}
	}()

	dir := filepath.Join(cfg.Pin, "v"+o.layout)
	others, err := o.layoutsBeside(dir)
	if err != nil {
		return nil, err
	}
	for _, d := range append([]string{dir}, others...) {
		if err := dropFresh(d); err != nil {
			return nil, fmt.Errorf("left by a start that was cut short: %w", err)
		}
	}
	if err := o.mkdirs(dir); err != nil {
		return nil, err
	}
	set, err := o.ensureMaps(dir, others)
	if err != nil {
		return nil, err
	}
	defer closeMaps(set)
	vars, err := settings(cfg)
	if err != nil {
		return nil, err
	}
	progs, err := loadPrograms(o.parts, set, vars, true)
	if err != nil {
		return nil, err
	}
	defer func() {
		if !keep {
			closeLoaded(progs)
		}
	}()
	inlay, err := assign(set)
	if err != nil {
		return nil, err
	}
	defer func() {
		if !keep {
			inlay.Close()
		}
	}()
	if fill != nil {
		if err := fill(inlay); err != nil {
			return nil, fmt.Errorf("fill maps: %w", err)
		}
	}
	s := &Set{cfg: cfg, maps: inlay, progs: progs, links: o.links, lock: lock, netnsIno: o.target.netnsIno}
	if err := o.attachAll(s, dir, others); err != nil {
		return nil, err
	}
	if cfg.Stats {
		if s.stats, err = ebpf.EnableStats(unix.BPF_STATS_RUN_TIME); err != nil {
			o.log.Warn("no statistics of programs", "err", err)
		}
	}
	for _, l := range progs {
		s.hooks = append(s.hooks, l.Hook)
		if l.Why != "" {
			o.log.Warn("hook is not whole", "hook", l.Name, "on", l.On, "why", l.Why, "instead", l.Without)
		}
	}
	keep = true
	return s, nil
}

// prepare makes the managed cgroup, the bpf file system and the pin directory.
func (o *opener) prepare() error {
	_, statErr := os.Stat(o.cfg.Cgroup)
	if err := ensureCgroup(o.cfg.Cgroup); err != nil {
		return err
	}
	if os.IsNotExist(statErr) {
		o.undo(func() error { return os.Remove(o.cfg.Cgroup) })
	}
	if err := EnsureBPFFS(o.cfg.Pin); err != nil {
		return err
	}
	if err := o.mkdir(o.cfg.Pin); err != nil {
		return err
	}
	t, err := openTarget(o.cfg.Cgroup)
	if err != nil {
		return err
	}
	o.target = t
	o.closeLater(t.netns)
	return nil
}

// mkdir makes a directory that rollback removes again, unless it was there.
func (o *opener) mkdir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pin directory: %w", err)
	}
	o.undo(func() error { return os.Remove(dir) })
	return nil
}

func (o *opener) mkdirs(dir string) error {
	return errors.Join(o.mkdir(dir), o.mkdir(filepath.Join(dir, mapsDir)), o.mkdir(filepath.Join(dir, linksDir)))
}

// layoutsBeside returns the directories of other layouts, the newest first.
func (o *opener) layoutsBeside(dir string) ([]string, error) {
	names, err := layoutDirs(o.cfg.Pin)
	if err != nil {
		return nil, fmt.Errorf("pin directory: %w", err)
	}
	slices.SortFunc(names, func(a, b string) int {
		if len(a) != len(b) {
			return len(b) - len(a) // v10 before v9
		}
		return strings.Compare(b, a)
	})
	var others []string
	for _, n := range names {
		if d := filepath.Join(o.cfg.Pin, n); d != dir {
			others = append(others, d)
		}
	}
	return others, nil
}

// attachAll attaches or replaces every program, then drops what is of no use any more.
func (o *opener) attachAll(s *Set, dir string, others []string) error {
	place := func(beside bool) error {
		for i := range s.progs {
			l := &s.progs[i]
			if l.prog == nil || l.beside != beside {
				continue
			}
			err := o.place(*l, dir, others)
			if err == nil {
				continue
			}
			if _, dead := errors.AsType[errKilled](err); l.Required || dead {
				return fmt.Errorf("hook %s: attach to %s: %w", l.Name, o.cfg.Cgroup, err)
			}
			l.On, l.Why = false, oneLine(err)
		}
		return nil
	}
	if attached, err := pins(filepath.Join(dir, linksDir)); err == nil && len(attached) == 0 {
		// As late as can be: what the old programs count from here on until they are replaced, a few
		// milliseconds, is forgotten with their layout. A start that was cut short later has carried.
		if err := carryCounters(s.maps.Counters, others); err != nil {
			o.log.Warn("counters start at 0", "err", err)
		}
	}
	if err := place(true); err != nil {
		return err
	}
	if len(others) > 0 {
		// Where the state of sockets has another shape, live ones get theirs before a program reads it:
		// what was denied while it lived stays denied.
		o.takeOver(s)
	}
	if err := place(false); err != nil {
		return err
	}
	if len(others) > 0 && o.cfg.Handover != nil {
		if err := o.cfg.Handover(s.maps); err != nil {
			return fmt.Errorf("hand over to layout %s: %w", o.layout, err)
		}
	}
	if len(others) > 0 {
		o.takeOver(s) // sockets that the old programs saw first in between
	}
	// From here on the new programs serve; nothing is undone.
	o.undos = nil
	var faults []error
	for _, f := range o.commits {
		faults = append(faults, f())
	}
	faults = append(faults, o.dropUnknown(dir))
	for _, other := range others {
		if err := o.step("drop layout " + filepath.Base(other)); err != nil {
			return err
		}
		_, err := o.dropLayout(other)
		faults = append(faults, err)
	}
	if err := errors.Join(faults...); err != nil {
		if _, dead := errors.AsType[errKilled](err); dead {
			return err
		}
		o.log.Error("what is no longer used could not be removed", "pin", o.cfg.Pin, "err", err)
	}
	return nil
}

// takeOver lets the iterators give live sockets their state in the maps of a new layout.
func (o *opener) takeOver(s *Set) {
	if err := s.Sweep(); err != nil {
		o.log.Warn("live connections were not all taken over", "err", err)
	}
}

// dropUnknown detaches hooks of this layout that this version of the agent does not have. One that it
// has and the kernel refused just now is left: the version before could load it.
func (o *opener) dropUnknown(dir string) error {
	names, err := pins(filepath.Join(dir, linksDir))
	for _, name := range names {
		if !slices.ContainsFunc(o.parts.hooks, func(h hook) bool { return h.Name == name }) {
			err = errors.Join(err, unpinLink(filepath.Join(dir, linksDir, name)))
		}
	}
	return err
}

// Maps returns the maps that the programs use; they stay open until Close.
func (s *Set) Maps() *bpfobj.InlayMaps { return s.maps }

// Cgroup returns the absolute path of the managed cgroup.
func (s *Set) Cgroup() string { return s.cfg.Cgroup }

// Pin returns the directory of the pins.
func (s *Set) Pin() string { return s.cfg.Pin }

// Hooks tells of each hook whether it is on, in the order of attaching.
func (s *Set) Hooks() []Hook { return slices.Clone(s.hooks) }

// Stats returns what the kernel counted of each program that is on.
func (s *Set) Stats() ([]ProgramStats, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, os.ErrClosed
	}
	var out []ProgramStats
	var faults []error
	for _, l := range s.progs {
		if l.prog == nil || !l.On {
			continue
		}
		st, err := l.prog.Stats()
		if err != nil {
			faults = append(faults, fmt.Errorf("hook %s: %w", l.Name, err))
			continue
		}
		out = append(out, ProgramStats{Name: l.Name, Runs: st.RunCount, Time: st.Runtime})
	}
	return out, errors.Join(faults...)
}

// Close lets go of the programs, which go on by their pins. It may be called twice.
func (s *Set) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var faults []error
	for _, l := range s.links {
		faults = append(faults, l.Close())
	}
	closeLoaded(s.progs)
	if s.stats != nil {
		faults = append(faults, s.stats.Close())
	}
	return errors.Join(append(faults, s.maps.Close(), s.lock.Close())...)
}
