package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotRunning is what Ask returns where no proxy listens.
var ErrNotRunning = errors.New("no DNS proxy runs")

// Ask returns the status of the proxy with that control socket; ErrNotRunning when there is none.
// It takes at most five seconds.
func Ask(ctx context.Context, socket string) (Status, error) {
	r, closing, err := converse(ctx, socket, "status")
	if err != nil {
		return Status{}, err
	}
	defer closing()
	if r.Status == nil {
		return Status{}, fmt.Errorf("DNS proxy at %s: it tells no status", socket)
	}
	return *r.Status, nil
}

// Stop ends the proxy with that control socket, after it has answered what it was asked, and
// returns when it has. Where none runs there is nothing to do. An agent that lives starts it again.
func Stop(ctx context.Context, socket string) error {
	// A process that hands over at this moment leaves another behind.
	const rounds = 3
	for range rounds {
		r, closing, err := converse(ctx, socket, "stop")
		if errors.Is(err, ErrNotRunning) {
			return nil
		}
		if err != nil {
			return err
		}
		r.until(time.Time{})
		_, err = r.lines.ReadByte()
		closing()
		if !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
			return fmt.Errorf("DNS proxy at %s: it was told to stop and did not in time: %w", socket, or(context.Cause(ctx), err))
		}
	}
	if _, err := Ask(ctx, socket); !errors.Is(err, ErrNotRunning) {
		return fmt.Errorf("DNS proxy at %s: stopped %d times, and one runs again: stop the node agent first", socket, rounds)
	}
	return nil
}

type conversation struct {
	response
	lines *bufio.Reader
	until func(time.Time)
}

// converse asks one thing and returns the answer; closing ends the connection.
func converse(ctx context.Context, socket, op string) (r conversation, closing func(), err error) {
	conn, err := dialControl(ctx, socket)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return r, nil, fmt.Errorf("%w at %s: %w", ErrNotRunning, socket, err)
	}
	if err != nil {
		return r, nil, fmt.Errorf("DNS proxy at %s: %w", socket, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	closing = func() {
		stop()
		_ = conn.Close()
	}
	r.lines = bufio.NewReaderSize(conn, maxLine)
	r.until = func(t time.Time) { _ = conn.SetReadDeadline(t) }
	r.until(time.Now().Add(talkTime))
	if err = writeLine(conn, realClock{}, request{Op: op}); err == nil {
		err = readLine(r.lines, &r.response)
	}
	if err == nil && r.Error != "" {
		err = errors.New(r.Error)
	}
	if err != nil {
		closing()
		return r, nil, fmt.Errorf("DNS proxy at %s: %w", socket, or(context.Cause(ctx), err))
	}
	return r, closing, nil
}

// EnsureConfig says which proxy must run.
type EnsureConfig struct {
	// Command and its arguments make a proxy with this Socket and Version: `inlay node proxy ...`.
	Command []string
	// Env of the command; nil means that of this process.
	Env []string
	// Socket is the control socket's path.
	Socket string
	// Version that must run. One that differs, older or newer, is replaced.
	Version string
	// Suffix that it must serve; empty means any.
	Suffix string
	// MapID is that of the maps that it must use, from MapID; 0 means any. A proxy may be older than
	// the pins: after `inlay node cleanup`, or beside maps of another layout.
	MapID uint32
	// LogFile gets what a started process writes. Empty means Socket.log. One larger than 1 MiB is
	// kept as LogFile.1 and begun anew.
	LogFile string
	// Told is called with the status of the proxy that suits, before Ensure returns. Nil is fine.
	Told func(Status)
	// Wait bounds how long a process may take to serve. Zero means 20 s.
	Wait time.Duration
	Log  *slog.Logger // nil discards
}

// askTime is how long a proxy may take to tell its status before it is taken for one that hangs: its
// heartbeat would be too old by then.
const askTime = time.Second

func (c EnsureConfig) ask(ctx context.Context) (Status, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, askTime, fmt.Errorf("no answer in %v", askTime))
	defer cancel()
	return Ask(ctx, c.Socket)
}

func (c EnsureConfig) suits(s Status) bool {
	return s.Version == c.Version && (c.Suffix == "" || s.Suffix == c.Suffix) && (c.MapID == 0 || s.MapID == c.MapID)
}

// found tells of a proxy that suits and returns its process number.
func (c EnsureConfig) found(s Status) int {
	if c.Told != nil {
		c.Told(s)
	}
	return s.PID
}

// Ensure returns the process number of a proxy that is as cfg wants it. It starts one where none
// answers, and lets a new one take over where another answers; the started process leads a session
// of its own and outlives this one. Call it from time to time: it costs one question when all is
// well. When a new process does not come to serve, an old one serves on, and the error ends with
// the last line that the new one wrote.
func Ensure(ctx context.Context, cfg EnsureConfig) (pid int, err error) {
	if len(cfg.Command) == 0 {
		return 0, errors.New("DNS proxy: no command to start it")
	}
	if err := checkSocket(cfg.Socket); err != nil {
		return 0, fmt.Errorf("DNS proxy: %w", err)
	}
	if cfg.Suffix != "" { // as the proxy will tell it
		suffix, err := ParseSuffix(cfg.Suffix)
		if err != nil {
			return 0, fmt.Errorf("DNS proxy: %w", err)
		}
		cfg.Suffix = suffix
	}
	cfg.Wait = or(cfg.Wait, 20*time.Second)
	cfg.LogFile = or(cfg.LogFile, cfg.Socket+".log")
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if st, err := cfg.ask(ctx); err == nil && cfg.suits(st) {
		return cfg.found(st), nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, cfg.Wait, fmt.Errorf("it does not answer after %v", cfg.Wait))
	defer cancel()
	// One at a time starts: what another one started meanwhile may do.
	lock, err := awaitLock(ctx, cfg.Socket+".start")
	if err != nil {
		return 0, fmt.Errorf("DNS proxy: %w", err)
	}
	defer lock.Close()
	st, err := cfg.ask(ctx)
	switch {
	case err == nil && cfg.suits(st):
		return cfg.found(st), nil
	case err == nil:
		cfg.Log.InfoContext(ctx, "DNS proxy is replaced", "pid", st.PID, "version", st.Version, "want", cfg.Version)
	case ctx.Err() != nil:
		return 0, err
	default:
		cfg.Log.InfoContext(ctx, "DNS proxy is started", "version", cfg.Version, "reason", err)
	}
	return start(ctx, cfg)
}

func awaitLock(ctx context.Context, path string) (*os.File, error) {
	for {
		f, err := takeLock(path)
		if f != nil || err != nil {
			return f, err
		}
		if err := wait(ctx, realClock{}, 20*time.Millisecond); err != nil {
			return nil, fmt.Errorf("another process holds %s.lock and starts a proxy: %w", path, err)
		}
	}
}

// start runs the command and returns when a proxy that suits answers.
func start(ctx context.Context, cfg EnsureConfig) (int, error) {
	log, from, err := openLog(cfg.LogFile)
	if err != nil {
		return 0, fmt.Errorf("DNS proxy: log file: %w", err)
	}
	defer log.Close()
	// Not CommandContext: the process shall outlive every context of this one.
	cmd := exec.Command(cfg.Command[0], cfg.Command[1:]...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = cfg.Env, "/", log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("DNS proxy: %w", err)
	}
	ended := make(chan error, 1)
	// Nobody waits for this goroutine, since its process outlives whoever could; without it an ended
	// proxy would stay a zombie until the agent ends.
	go func() { ended <- cmd.Wait() }()

	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var last Status // of whoever answered last
	for {
		if st, err := cfg.ask(ctx); err == nil {
			if cfg.suits(st) {
				return cfg.found(st), nil
			}
			last = st
		}
		var why error
		select {
		case err := <-ended:
			// Another one may have taken over from it, if it came to serve.
			if st, askErr := cfg.ask(ctx); askErr == nil && cfg.suits(st) {
				return cfg.found(st), nil
			}
			why = fmt.Errorf("it ended before it served: %w", or(err, errors.New("exit status 0")))
		case <-ctx.Done():
			why = context.Cause(ctx)
			if last.PID == cmd.Process.Pid {
				why = fmt.Errorf("it serves as version %q, suffix %q, maps %d: want version %q, suffix %q, maps %d", last.Version, last.Suffix, last.MapID, cfg.Version, cfg.Suffix, cfg.MapID)
			} else {
				_ = cmd.Process.Kill() // it must not come to serve after this was told to have failed
			}
		case <-tick.C:
			continue
		}
		return 0, fmt.Errorf("DNS proxy %q: process %d: %w%s (log: %s)", strings.Join(cfg.Command, " "), cmd.Process.Pid, why, lastLine(cfg.LogFile, from), cfg.LogFile)
	}
}

const maxLog = 1 << 20

// openLog opens a log for appending and returns where it begins to grow.
func openLog(path string) (*os.File, int64, error) {
	if info, err := os.Stat(path); err == nil && info.Size() > maxLog {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, 0, err
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

// lastLine is the end of what was written to a log from an offset on, as part of an error.
func lastLine(path string, from int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil {
		from = max(from, info.Size()-1024)
	}
	b := make([]byte, 1024)
	n, _ := f.ReadAt(b, from)
	lines := strings.Split(strings.TrimSpace(string(b[:n])), "\n")
	if last := lines[len(lines)-1]; last != "" {
		return ": " + last
	}
	return ""
}
