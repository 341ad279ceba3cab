package store

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
)

// Faults that callers tell apart; the texts around them name the directory and the remedy.
var (
	ErrInUse = errors.New("in use")
	ErrFull  = errors.New("full")
	ErrNewer = errors.New("written by a newer version")
)

// explain turns a fault of the file system into one that says what to do about it.
func explain(dir, doing string, err error) error {
	switch {
	case errors.Is(err, ErrInUse), errors.Is(err, ErrFull), errors.Is(err, ErrNewer):
		return err
	case is(err, syscall.ENOSPC), is(err, syscall.EDQUOT), is(err, syscall.EFBIG):
		return fmt.Errorf("the data directory %s is %w (%w): free some space, or pass another one with --data DIR", dir, ErrFull, err)
	case is(err, syscall.EROFS), errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("cannot %s the data directory %s: %w: make it writable for this user, or pass another one with --data DIR", doing, dir, err)
	case errors.Is(err, syscall.ENOTDIR), errors.Is(err, fs.ErrExist):
		return fmt.Errorf("cannot %s the data directory %s: %w: want a directory, pass one with --data DIR", doing, dir, err)
	}
	return fmt.Errorf("cannot %s the data directory %s: %w", doing, dir, err)
}

// is matches by text too: where bbolt grows its file it keeps only the text of the cause.
func is(err error, no syscall.Errno) bool {
	return errors.Is(err, no) || strings.HasSuffix(err.Error(), ": "+no.Error())
}

// notOurs says that path holds something else, which is never overwritten.
func notOurs(path string, err error) error {
	return fmt.Errorf("%s is not a data file of inlay or is damaged: %w: move it away to start empty (instances register again; configuration is read from its directory), or pass another directory with --data DIR", path, err)
}
