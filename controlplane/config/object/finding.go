package object

import (
	"cmp"
	"fmt"
	"slices"
)

// Severity says what a finding does to the set.
type Severity int

// Severities.
const (
	Fault   Severity = iota // the set is refused
	Warning                 // the set is used all the same
)

// String returns "fault" or "warning".
func (s Severity) String() string {
	if s == Warning {
		return "warning"
	}
	return "fault"
}

// Finding is one thing to say about the configuration.
type Finding struct {
	Code     string // stable; see Codes
	Severity Severity
	File     string // empty when the finding belongs to no file
	Line     int    // 1-based
	Col      int    // 1-based
	Message  string // what was found, then what is accepted
}

// String returns "file:line:col CODE message".
func (f Finding) String() string {
	if f.File == "" {
		return f.Code + " " + f.Message
	}
	return f.Source() + " " + f.Code + " " + f.Message
}

// Source returns "file:line:col", or nothing when the finding belongs to no file.
func (f Finding) Source() string {
	if f.File == "" {
		return ""
	}
	return fmt.Sprintf("%s:%d:%d", f.File, f.Line, f.Col)
}

// String returns "file:line:col".
func (p Pos) String() string { return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Col) }

// At makes a finding at p. The severity is that of the code.
func At(p Pos, c Code, format string, args ...any) Finding {
	return Finding{Code: string(c), Severity: c.Severity(), File: p.File, Line: p.Line, Col: p.Col, Message: fmt.Sprintf(format, args...)}
}

// SortFindings orders findings by file, line, column, code and message, in place, and returns
// them without repetitions.
func SortFindings(f []Finding) []Finding {
	slices.SortFunc(f, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col),
			cmp.Compare(a.Code, b.Code), cmp.Compare(a.Message, b.Message))
	})
	return slices.Compact(f)
}

// HasFaults reports whether a finding refuses the set.
func HasFaults(f []Finding) bool {
	return slices.ContainsFunc(f, func(f Finding) bool { return f.Severity == Fault })
}
