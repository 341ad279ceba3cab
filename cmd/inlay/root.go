package main

import (
	"fmt"
	"os"
	"strings"
)

// needRoot refuses a user who is not root, with the line to run instead.
func needRoot(why string) error {
	if os.Geteuid() == 0 {
		return nil
	}
	return &exitError{exitUnsupported, fmt.Errorf("%s; run: %s", why, sudoLine(os.Args))}
}

// sudoLine is the command line that does the same as root. Sudo starts with an environment of its own,
// so the program is named by its path.
func sudoLine(args []string) string {
	words := []string{"sudo"}
	if self, err := os.Executable(); err == nil {
		words = append(words, self)
	} else {
		words = append(words, args[0])
	}
	words = append(words, args[1:]...)
	for i, w := range words {
		words[i] = shellWord(w)
	}
	return strings.Join(words, " ")
}

// shellWord quotes a word as POSIX shells read it back.
func shellWord(w string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=,@%+"
	if w != "" && strings.Trim(w, plain) == "" {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}
