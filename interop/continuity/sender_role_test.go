package continuity

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// senderSettings: one connection that sends so many segments of a size, at the command "go".
type senderSettings struct {
	Target   string `json:"target"`
	Segments int    `json:"segments"`
	Size     int    `json:"size"`
}

func playSender(ctx context.Context, settings []byte) error {
	var set senderSettings
	if err := json.Unmarshal(settings, &set); err != nil {
		return err
	}
	say(report{Kind: "ready"})
	commands(ctx, map[string]func() report{"go": func() report {
		numbers := map[string]int64{}
		if err := set.send(numbers); err != nil {
			numbers["failed"] = 1
			return report{Text: err.Error(), Numbers: numbers}
		}
		return report{Numbers: numbers}
	}})
	return nil
}

// send tells what the server received, and what the kernel says was sent again when all of it was
// acknowledged: the server answers after it has read the end.
func (s senderSettings) send(numbers map[string]int64) error {
	conn, err := net.Dial("tcp", s.Target)
	if err != nil {
		return err
	}
	c := conn.(*net.TCPConn)
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("count\n")); err != nil {
		return err
	}
	for range s.Segments { // Go sets TCP_NODELAY: a segment each, unless the window is full
		if _, err := c.Write(make([]byte, s.Size)); err != nil {
			return err
		}
		<-time.After(time.Millisecond)
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	var received int64
	if _, err := fmt.Fscan(c, &received); err != nil {
		return err
	}
	numbers["received"] = received
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var info *unix.TCPInfo
	var asked error
	if err := raw.Control(func(fd uintptr) {
		info, asked = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); err != nil {
		return err
	}
	if asked != nil {
		return asked
	}
	numbers["retransmits"] = int64(info.Total_retrans)
	return nil
}
