package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	roles := map[string]func() error{
		"space": holdSpace, "resolv": underResolver, "client": goClient, "server": goServer, "dns": serveDNS, "register": registerRole, "hide": underHidden,
	}
	role := os.Getenv("NODE_ROLE")
	if role == "" {
		// A program built with the race detector sleeps a second before it exits. It still reports
		// what it saw.
		if os.Getenv("GORACE") == "" {
			_ = os.Setenv("GORACE", "atexit_sleep_ms=0")
		}
		code := m.Run()
		if builtDir != "" {
			_ = os.RemoveAll(builtDir)
		}
		os.Exit(code)
	}
	play := roles[role]
	if play == nil {
		fmt.Fprintf(os.Stderr, "role %q: unknown\n", role)
		os.Exit(2)
	}
	if err := play(); err != nil {
		fmt.Fprintln(os.Stderr, role+":", err)
		os.Exit(1)
	}
}

// holdSpace keeps the network namespace that it was started in until its input ends.
func holdSpace() error {
	fmt.Println("ready")
	for s := bufio.NewScanner(os.Stdin); s.Scan(); {
	}
	return nil
}

// underResolver runs a program that finds another /etc/resolv.conf: NODE_RESOLV.
func underResolver() error {
	if err := ownMounts(); err != nil {
		return err
	}
	if err := unix.Mount(os.Getenv("NODE_RESOLV"), "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount --bind: %w", err)
	}
	if err := os.Setenv("NODE_ROLE", os.Getenv("NODE_THEN")); err != nil {
		return err
	}
	return syscall.Exec(os.Args[1], os.Args[1:], os.Environ())
}

// ownMounts gives this thread, and what it becomes by exec, mounts of its own.
func ownMounts() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mount --make-rprivate: %w", err)
	}
	return nil
}

// orders calls do for each line of the input and prints what it gives, until the input ends or a
// signal comes.
func orders(do func(ctx context.Context, words []string) answer) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	lines := make(chan string)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(os.Stdin); s.Scan(); {
			lines <- s.Text()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			if os.Getenv("NODE_STUBBORN") == "" {
				return nil
			}
			line, ok := <-lines // goes on until its input ends
			if !ok {
				return nil
			}
			say(do(context.Background(), strings.Fields(line)))
		case line, ok := <-lines:
			if !ok {
				return nil
			}
			say(do(ctx, strings.Fields(line)))
		}
	}
}

func say(a answer) {
	raw, _ := json.Marshal(a) // plain values
	fmt.Println(string(raw))
}

// refused is an error as an answer.
func refused(err error) answer {
	var errno syscall.Errno
	var late net.Error
	switch {
	case errors.As(err, &late) && late.Timeout(), errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.EINPROGRESS):
		return answer{Errno: syscall.ETIMEDOUT}
	case errors.As(err, &errno):
		return answer{Errno: errno}
	}
	return answer{Fault: err.Error()}
}
