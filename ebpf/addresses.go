package ebpf

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// localAddrs returns the addresses of this machine in the agent's network namespace, and the cookie
// that programs know the namespace by.
func localAddrs() (netns uint64, addrs []netip.Addr, err error) {
	if netns, err = netnsCookie(); err != nil {
		return 0, nil, err
	}
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	// A dump that was interrupted by a change is told of by another event.
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return 0, nil, fmt.Errorf("addresses of this machine: %w", err)
	}
	for _, a := range list {
		if a.IPNet == nil {
			continue
		}
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			addrs = append(addrs, ip.Unmap())
		}
	}
	return netns, addrs, nil
}

// netnsCookie is the number of the network namespace that never comes again. socket(7) does not
// tell of it; include/uapi/asm-generic/socket.h: SO_NETNS_COOKIE, since Linux 5.14.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	c, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("cookie of the network namespace: %w", err)
	}
	return c, nil
}

// addressWait gathers changes of addresses, which come in bursts.
const addressWait = 100 * time.Millisecond

// addressLoop keeps the programs told of this machine's addresses.
func (a *Agent) addressLoop(ctx context.Context) error {
	for ctx.Err() == nil {
		err := a.followAddresses(ctx)
		a.mu.Lock()
		a.once(ctx, "addresses", err, "addresses of this machine are not followed; looked at again in 10 s")
		a.mu.Unlock()
		a.refreshAddresses(ctx)
		a.pause(ctx, 10*time.Second)
	}
	return nil
}

// followAddresses reads events until ctx is done or the socket fails.
func (a *Agent) followAddresses(ctx context.Context) error {
	events, done := make(chan netlink.AddrUpdate, 64), make(chan struct{})
	failed := make(chan error, 1)
	err := netlink.AddrSubscribeWithOptions(events, done, netlink.AddrSubscribeOptions{ErrorCallback: func(err error) {
		select {
		case failed <- err:
		default:
		}
	}})
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer func() {
		close(done)
		for range events { // the library's goroutine ends when it has closed the channel
		}
	}()
	a.refreshAddresses(ctx) // what changed before the subscription
	for {
		select {
		case _, ok := <-events:
			if !ok {
				select {
				case err := <-failed:
					return fmt.Errorf("netlink: %w", err)
				default:
					return errors.New("netlink: the subscription ended")
				}
			}
			if !a.pause(ctx, addressWait) {
				return nil
			}
			for len(events) > 0 {
				<-events
			}
			a.refreshAddresses(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

func (a *Agent) refreshAddresses(ctx context.Context) {
	cookie, addrs, err := a.rooms.localAddrs()
	if err == nil {
		a.table.SetLocalAddrs(cookie, append(addrs, a.cfg.NodeAddresses...))
		signal(a.dirty)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.once(ctx, "address list", err, "addresses of this machine cannot be read, those before hold")
}

// pause waits for d by the clock; false means that ctx ended first.
func (a *Agent) pause(ctx context.Context, d time.Duration) bool {
	due := make(chan struct{})
	stop := a.cfg.Clock.AfterFunc(d, func() { close(due) })
	defer stop()
	select {
	case <-due:
		return true
	case <-ctx.Done():
		return false
	}
}
