package main

import (
	"encoding/json"
	"fmt"
	"os"
)

// readyLine is what a daemon tells the process that waits for it.
type readyLine struct {
	Addresses map[string]string `json:"addresses"`
}

// tellReady writes one line of JSON to the descriptor that --ready-fd names and closes it, as the
// parent asked. Zero means that nobody waits.
func tellReady(fd int, addresses map[string]string) error {
	if fd == 0 {
		return nil
	}
	f := os.NewFile(uintptr(fd), "ready")
	if f == nil {
		return fmt.Errorf("--ready-fd %d: no such descriptor", fd)
	}
	raw, err := json.Marshal(readyLine{addresses})
	if err != nil {
		return err
	}
	if _, err := f.Write(append(raw, '\n')); err != nil {
		return fmt.Errorf("--ready-fd %d: %w", fd, err)
	}
	return f.Close()
}
