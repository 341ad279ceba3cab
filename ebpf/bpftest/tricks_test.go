package bpftest

import (
	"fmt"
	"net/netip"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// trick makes the system calls that only somebody makes who wants around the hooks.
func (o *order) trick() error {
	switch o.Op {
	case "set": // a number
		return unix.SetsockoptInt(o.FD, o.Proto, o.Type, o.Millis)
	case "device":
		return unix.SetsockoptString(o.FD, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, o.Name)
	case "disconnect": // connect(2): "by connecting to an address with the sa_family member of sockaddr set to AF_UNSPEC"
		var sa unix.RawSockaddr
		_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(o.FD), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa))
		if errno != 0 {
			return errno
		}
	case "fastopen": // tcp(7), TCP_FASTOPEN: data with the SYN, without connect()
		return unix.Sendto(o.FD, o.Data, unix.MSG_FASTOPEN, sockaddr(o.FD, o.Addr))
	case "uring":
		return uringConnect(o.FD, o.Proto != 0, sockaddr(o.FD, o.Addr))
	case "many": // a datagram each to as many ports as Millis says
		for i := range o.Millis {
			to := netip.AddrPortFrom(o.Addr.Addr(), uint16(1024+i))
			if err := unix.Sendto(o.FD, []byte("x"), 0, sockaddr(o.FD, to)); err != nil && err != unix.ECONNREFUSED {
				return err
			}
		}
	case "nonblock":
		return unix.SetNonblock(o.FD, true)
	case "error":
		n, err := unix.GetsockoptInt(o.FD, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && n != 0 {
			err = syscall.Errno(n)
		}
		return err
	default:
		return fmt.Errorf("order %q: unknown", o.Op)
	}
	return nil
}

// uringConnect connects by IORING_OP_CONNECT; with poll a thread of the kernel makes the call.
func uringConnect(fd int, poll bool, to unix.Sockaddr) error {
	const (
		setupSQPoll   = 1 << 1
		enterGet      = 1
		enterWakeup   = 1 << 1
		opConnect     = 16
		offSQ, offSQE = 0, 0x10000000
	)
	type sqOff struct{ head, tail, mask, entries, flags, dropped, array, r1, r2, r3 uint32 }
	type cqOff struct{ head, tail, mask, entries, overflow, cqes, flags, r1, r2, r3 uint32 }
	var p struct {
		sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
		r                                                    [3]uint32
		sq                                                   sqOff
		cq                                                   cqOff
	}
	if poll {
		p.flags, p.idle = setupSQPoll, 1000
	}
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return fmt.Errorf("io_uring_setup: %s", errno.Error())
	}
	defer unix.Close(int(ring))
	size := max(int(p.sq.array+p.sqEntries*4), int(p.cq.cqes+p.cqEntries*16))
	rings, err := unix.Mmap(int(ring), offSQ, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("rings: %s", err.Error())
	}
	defer unix.Munmap(rings)
	sqes, err := unix.Mmap(int(ring), offSQE, int(p.sqEntries)*64, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("entries: %s", err.Error())
	}
	defer unix.Munmap(sqes)
	var raw [128]byte
	length := 0
	switch to := to.(type) {
	case *unix.SockaddrInet4:
		sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: to.Addr, Port: be16(uint16(to.Port))}
		length = copy(raw[:], (*[unsafe.Sizeof(sa)]byte)(unsafe.Pointer(&sa))[:])
	case *unix.SockaddrInet6:
		sa := unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: to.Addr, Port: be16(uint16(to.Port))}
		length = copy(raw[:], (*[unsafe.Sizeof(sa)]byte)(unsafe.Pointer(&sa))[:])
	}
	at := func(b []byte, off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&b[off])) }
	sqes[0] = opConnect
	*(*int32)(unsafe.Pointer(&sqes[4])) = int32(fd)
	*(*uint64)(unsafe.Pointer(&sqes[8])) = uint64(length)
	*(*uint64)(unsafe.Pointer(&sqes[16])) = uint64(uintptr(unsafe.Pointer(&raw)))
	*at(rings, p.sq.array) = 0
	atomic.AddUint32(at(rings, p.sq.tail), 1)
	flags := uintptr(enterGet)
	submit := uintptr(1)
	if poll {
		flags, submit = flags|enterWakeup, 0
	}
	for {
		_, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, submit, 1, flags, 0, 0)
		if errno != unix.EINTR {
			break
		}
		submit = 0
	}
	runtime.KeepAlive(&raw)
	if errno != 0 {
		return fmt.Errorf("io_uring_enter: %s", errno.Error())
	}
	if res := *(*int32)(unsafe.Pointer(&rings[p.cq.cqes+8])); res < 0 {
		return syscall.Errno(-res)
	}
	return nil
}
