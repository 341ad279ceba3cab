//go:build unix

package xds

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// readOwned reads a file that must be a regular one, of this user and closed to others: what it
// says decides where calls go.
func readOwned(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: remove it", path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("%s belongs to uid %d, this process runs as uid %d: remove the file or set INLAY_STATE_DIR", path, st.Uid, os.Geteuid())
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return nil, fmt.Errorf("%s has mode %#o: want 0600; run chmod 600 on it if nobody else wrote it, else remove it", path, perm)
	}
	return io.ReadAll(f)
}
