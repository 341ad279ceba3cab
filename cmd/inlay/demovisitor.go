package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// startVisitor starts a shell in the mesh that calls what it is told, and tells how each went.
func (d *legacyDemo) startVisitor(args []string, tools map[string]string) (io.WriteCloser, *bufio.Scanner, error) {
	const script = `while read -r how url; do
  said=$("$0" --silent --noproxy '*' --max-time 5 --output /dev/null --write-out '%{http_code}' --request "$how" "$url")
  echo "$? $said $url"
done`
	in, asks, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	tells, told, err := os.Pipe()
	if err != nil {
		return nil, nil, errors.Join(err, in.Close(), asks.Close())
	}
	err = d.programs.launch("visitor", true, append(args, tools["sh"], "-c", script, tools["curl"]), in, told)
	_, _ = in.Close(), told.Close()
	if err != nil {
		return nil, nil, errors.Join(err, asks.Close(), tells.Close())
	}
	return asks, bufio.NewScanner(tells), nil
}

// visitorLog asks curl for calls and counts how they went.
type visitorLog struct {
	asks  io.Writer
	tells *bufio.Scanner

	calls, failed, denied uint64
}

// The names of one service, as programs may write them.
var paymentsURLs = []string{"http://payments:8080/pay/7", "http://payments.default:8080/pay/7", "http://payments.default.mesh:8080/pay/7"}

const deniedURL = "http://legacy.default/"

// call has curl make one call: its exit code, and the HTTP status, 000 for none.
func (v *visitorLog) call(method, url string) (code, status string, err error) {
	if _, err := fmt.Fprintf(v.asks, "%s %s\n", method, url); err != nil {
		return "", "", fmt.Errorf("demo: visitor: %w", err)
	}
	if !v.tells.Scan() {
		return "", "", errors.Join(errors.New("demo: visitor ended; its own words are above"), v.tells.Err())
	}
	f := strings.Fields(v.tells.Text())
	if len(f) != 3 || f[2] != url {
		return "", "", fmt.Errorf("demo: visitor said %q", v.tells.Text())
	}
	return f[0], f[1], nil
}

// warmUp waits until the first call comes through, and one is denied by the policy: services are
// registered, and the node knows them.
func (v *visitorLog) warmUp(ctx context.Context, seen *flowCount) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	patience := time.After(30 * time.Second)
	for {
		code, status, err := v.call("POST", paymentsURLs[0])
		if err != nil {
			return err
		}
		if _, _, err := v.call("GET", deniedURL); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-patience:
			return fmt.Errorf("demo: after 30 s curl %s: exit code %s, status %s; denied by a policy: %v", paymentsURLs[0], code, status, seen.rule() != nil)
		case <-tick.C:
		}
		if code == "0" && status == "200" && seen.rule() != nil {
			return nil
		}
	}
}

// once makes a round of calls: the Go service by each of its names, and the one that is denied.
func (v *visitorLog) once() error {
	for _, url := range paymentsURLs {
		code, status, err := v.call("POST", url)
		if err != nil {
			return err
		}
		v.calls++
		if code != "0" || status != "200" {
			v.failed++
		}
	}
	code, _, err := v.call("GET", deniedURL)
	switch {
	case err != nil:
		return err
	case code == "7": // curl(1): "Failed to connect to host"
		v.denied++
	default:
		v.failed++
	}
	return nil
}

// lineFilter passes on whole lines that do not hold drop. It is safe for concurrent use.
type lineFilter struct {
	to   io.Writer
	drop []byte

	mu   sync.Mutex
	line []byte // the beginning of one
}

func (f *lineFilter) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for rest := b; len(rest) > 0; {
		end := bytes.IndexByte(rest, '\n') + 1
		if end == 0 {
			f.line = append(f.line, rest...)
			break
		}
		f.line = append(f.line, rest[:end]...)
		rest = rest[end:]
		if !bytes.Contains(f.line, f.drop) {
			if _, err := f.to.Write(f.line); err != nil {
				return 0, err
			}
		}
		f.line = f.line[:0]
	}
	return len(b), nil
}
