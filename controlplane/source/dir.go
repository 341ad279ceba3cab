package source

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Clock tells the time; the real one is used where it is nil.
type Clock interface {
	Now() time.Time
	AfterFunc(d time.Duration, f func()) (stop func() bool)
}

type realClock struct{}

func (realClock) Now() time.Time { return time.Now() }
func (realClock) AfterFunc(d time.Duration, f func()) func() bool {
	return time.AfterFunc(d, f).Stop
}

// Options of a Dir. A zero field means its default.
type Options struct {
	Limits Limits
	// Debounce is how long the directory must be quiet after a change before it is read, so that a
	// file that is being written is not read in parts. Default 50 ms. Under changes without end it
	// is read after ten times that.
	Debounce time.Duration
	// Rescan is how often the directory is listed although nobody told of a change: for file
	// systems without notification, and for a directory that vanished. Default 2 s.
	Rescan time.Duration
	// Problem is told why the directory cannot be read, and nil once it can be again; each change
	// once, from the goroutine of Run. The last revision stays in force meanwhile. May be nil.
	Problem func(error)
	Clock   Clock
	Log     *slog.Logger // nil discards
}

// Dir is a directory of configuration that is watched.
type Dir struct {
	path string
	opts Options
}

// NewDir checks that path is a directory. Nothing is watched until Run.
func NewDir(path string, opts Options) (*Dir, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("configuration directory %s: %w; create it (an empty one is fine) or name another with --config", path, cause(err))
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("configuration directory %s: is a file: want the directory that holds it", path)
	}
	opts.Limits = opts.Limits.withDefaults()
	if opts.Debounce == 0 {
		opts.Debounce = 50 * time.Millisecond
	}
	if opts.Rescan == 0 {
		opts.Rescan = 2 * time.Second
	}
	if opts.Problem == nil {
		opts.Problem = func(error) {}
	}
	if opts.Clock == nil {
		opts.Clock = realClock{}
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Dir{path: path, opts: opts}, nil
}

// Run calls changed with the first revision at once (or as soon as the directory can be read) and
// then with each one that differs from the one before, from this goroutine, one at a time, until
// ctx is done. It returns ctx's error.
//
// Without notifications of the file system (their number is limited) it says so once and goes on
// by listing the directory every Rescan.
func (d *Dir) Run(ctx context.Context, changed func(Revision)) error {
	w := &watcher{dir: d, changed: changed, wake: make(chan struct{}, 1), watched: map[string]bool{}}
	var events <-chan fsnotify.Event
	var errs <-chan error
	if fw, err := fsnotify.NewWatcher(); err != nil {
		d.opts.Log.WarnContext(ctx, "no file notifications; the configuration directory is listed instead", "dir", d.path, "every", d.opts.Rescan, "err", err)
	} else {
		defer fw.Close() // waits for its goroutine's channels
		w.fs, events, errs = fw, fw.Events, fw.Errors
	}
	w.check(ctx, true)
	rescan := d.opts.Clock.AfterFunc(d.opts.Rescan, w.poke)
	defer func() { rescan() }()

	var quiet func() bool
	var fire = make(chan struct{}, 1)
	var since time.Time // the first change not yet read
	for {
		select {
		case <-ctx.Done():
			if quiet != nil {
				quiet()
			}
			return ctx.Err()
		case e, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			if e.Op == fsnotify.Chmod {
				continue // also sent for reads by some file systems
			}
			now := d.opts.Clock.Now()
			if since.IsZero() {
				since = now
			}
			if quiet != nil {
				quiet()
			}
			wait := min(d.opts.Debounce, max(0, 10*d.opts.Debounce-now.Sub(since)))
			quiet = d.opts.Clock.AfterFunc(wait, func() {
				select {
				case fire <- struct{}{}:
				default:
				}
			})
		case <-fire:
			since = time.Time{}
			w.check(ctx, true)
		case err, ok := <-errs:
			if !ok {
				errs = nil
				continue
			}
			// Events were lost (an overflow, say): list at once.
			d.opts.Log.WarnContext(ctx, "file notifications failed; the configuration directory is listed", "dir", d.path, "err", err)
			w.check(ctx, true)
		case <-w.wake:
			w.check(ctx, false)
			rescan = d.opts.Clock.AfterFunc(d.opts.Rescan, w.poke)
		}
	}
}

// watcher is the state of one Run.
type watcher struct {
	dir     *Dir
	changed func(Revision)
	fs      *fsnotify.Watcher // nil without notifications
	watched map[string]bool
	wake    chan struct{}

	last    *listing
	id      string // of the last revision; empty before the first
	problem string
}

func (w *watcher) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// check lists the directory, reads it when something may have changed, and hands on a revision
// that differs.
func (w *watcher) check(ctx context.Context, event bool) {
	for range 5 {
		l, err := scan(w.dir.path, w.dir.opts.Limits)
		if err != nil {
			w.fail(ctx, err)
			w.last = nil // read again whatever the listing says
			if l == nil {
				w.forget(nil) // the directory is gone, and its watches with it
			} else {
				w.watch(ctx, l.dirs)
			}
			return
		}
		w.watch(ctx, l.dirs)
		if !event && w.last != nil && w.last.equal(l) {
			w.fail(ctx, nil)
			return
		}
		files, err := l.read(w.dir.opts.Limits)
		if err != nil {
			w.last = nil
			w.fail(ctx, err)
			return
		}
		// A revision is all files of one moment: when the listing changed while they were read,
		// or a directory appeared that was not watched when it was listed, read again.
		again, err := scan(w.dir.path, w.dir.opts.Limits)
		if err != nil || !again.equal(l) {
			continue
		}
		w.last = l
		w.fail(ctx, nil)
		if r := NewRevision(files); r.ID != w.id {
			w.id = r.ID
			w.changed(r)
		}
		return
	}
	// It changes faster than it can be read; the next event or listing tries again.
	w.last = nil
}

// fail tells of a problem that is new, or over.
func (w *watcher) fail(ctx context.Context, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text == w.problem {
		return
	}
	w.problem = text
	if err != nil {
		w.dir.opts.Log.WarnContext(ctx, "configuration cannot be read; the last revision stays", "dir", w.dir.path, "err", err)
	} else {
		w.dir.opts.Log.InfoContext(ctx, "configuration can be read again", "dir", w.dir.path)
	}
	w.dir.opts.Problem(err)
}

// watch follows exactly dirs. A directory that was removed and made again has a new inode, whose
// watch has to be made anew; adding one twice is harmless.
func (w *watcher) watch(ctx context.Context, dirs []string) {
	if w.fs == nil {
		return
	}
	now := map[string]bool{}
	for _, dir := range dirs {
		dir = filepath.Clean(dir)
		now[dir] = true
		if err := w.fs.Add(dir); err != nil && !w.watched[dir] {
			w.dir.opts.Log.WarnContext(ctx, "directory cannot be watched; it is listed instead", "dir", dir, "err", err)
		}
		w.watched[dir] = true
	}
	w.forget(now)
}

func (w *watcher) forget(keep map[string]bool) {
	for dir := range w.watched {
		if !keep[dir] {
			delete(w.watched, dir)
			if w.fs != nil {
				_ = w.fs.Remove(dir) // fails when the directory is gone, and its watch with it
			}
		}
	}
}
