// Package check judges the values that every kind of object has: names, numbers, durations,
// labels and metadata. package config and its translators call it, so that the same fault reads
// the same in each kind.
//
// It looks at one object only and knows nothing of others.
package check

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
	"github.com/inlay-mesh/inlay/identity"
)

// Object collects the findings about one object. Paths are keys and indexes from the document.
// A value that was reported as of a wrong type is not judged again.
type Object struct {
	Tree     *tree.Tree
	Label    string // begins each message: `MeshService "orders"`
	Findings []object.Finding
}

// Add reports a finding at the value of path, or above it when there is none.
func (o *Object) Add(c object.Code, path []any, format string, args ...any) {
	o.add(o.Tree.At(path...), c, path, format, args...)
}

// AddKey reports a finding at the key of path.
func (o *Object) AddKey(c object.Code, path []any, format string, args ...any) {
	o.add(o.Tree.KeyAt(path...), c, path, format, args...)
}

func (o *Object) add(pos object.Pos, c object.Code, path []any, format string, args ...any) {
	if !o.Tree.Sound(path...) {
		return
	}
	msg := fmt.Sprintf(format, args...)
	if p := tree.PathString(path...); p != "" {
		sep := ": "
		if strings.HasPrefix(msg, " ") {
			sep = ""
		}
		msg = p + sep + msg
	}
	o.Findings = append(o.Findings, object.At(pos, c, "%s: %s", o.Label, msg))
}

// Required reports a fault unless something is at path.
func (o *Object) Required(want string, path ...any) bool {
	if o.Tree.Has(path...) {
		return true
	}
	o.Add(object.MissingField, path, "missing: want %s", want)
	return false
}

// NoEmpty reports keys without a value in the mapping at path: in a condition, nothing would match
// everything.
func (o *Object) NoEmpty(path ...any) {
	n := o.Tree.Get(path...)
	if n == nil {
		return
	}
	for _, k := range n.Keys() {
		at := append(slices.Clone(path), k)
		if !o.Tree.Has(at...) {
			o.AddKey(object.MissingField, at, "no value: want one, or the key removed")
		}
	}
}

// Range reports a number that is not from least to most.
func (o *Object) Range(n, least, most int64, path ...any) bool {
	if n >= least && n <= most {
		return true
	}
	o.Add(object.OutOfRange, path, " %d: want %d to %d", n, least, most)
	return false
}

// Count reports a list with too many entries, or too few.
func (o *Object) Count(n, least, most int, path ...any) bool {
	switch {
	case n < least:
		o.Add(object.OutOfRange, path, "%d entries: want at least %d", n, least)
	case n > most:
		o.Add(object.OutOfRange, path, "%d entries: want at most %d", n, most)
	default:
		return true
	}
	return false
}

// Enum reports a value that is none of those accepted.
func (o *Object) Enum(value string, accepted []string, path ...any) bool {
	if slices.Contains(accepted, value) {
		return true
	}
	msg := fmt.Sprintf(" %q: want %s", value, strings.Join(accepted, ", "))
	if near := tree.Nearest(value, accepted); near != "" {
		msg += fmt.Sprintf("; did you mean %q?", near)
	}
	o.Add(object.BadEnum, path, "%s", msg)
	return false
}

// Length reports text of more bytes than most.
func (o *Object) Length(s string, most int, path ...any) bool {
	if len(s) <= most {
		return true
	}
	o.Add(object.OutOfRange, path, "%d characters: want at most %d", len(s), most)
	return false
}

var (
	labelKey   = regexp.MustCompile(`^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]$`)
	labelValue = regexp.MustCompile(`^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$`)
	subdomain  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
)

const wantLabel = "want a DNS label: lower-case letters, digits and hyphens, a letter or digit at both ends, 1 to 63 characters"

// IsDNSLabel reports whether s is an RFC 1123 label.
func IsDNSLabel(s string) bool { return identity.CheckName(s) == nil }

// DNSLabel reports a name that is not an RFC 1123 label.
func (o *Object) DNSLabel(s string, path ...any) bool {
	if IsDNSLabel(s) {
		return true
	}
	if strings.Contains(s, ".") {
		o.Add(object.BadName, path, " %q: a name holds no dot: %s", clip(s), wantLabel)
	} else {
		o.Add(object.BadName, path, " %q: %s", clip(s), wantLabel)
	}
	return false
}

// Subdomain reports a name that is not an RFC 1123 subdomain: labels with dots between.
func (o *Object) Subdomain(s string, path ...any) bool {
	if len(s) <= 253 && subdomain.MatchString(s) {
		return true
	}
	o.Add(object.BadName, path, " %q: want lower-case letters, digits, hyphens and dots, a letter or digit at both ends, 1 to 253 characters", clip(s))
	return false
}

// ServiceName reports a name that no service can have.
func (o *Object) ServiceName(s string, path ...any) bool {
	if s == "localhost" {
		o.Add(object.BadName, path, ` "localhost": names the machine itself and never a service: want another name`)
		return false
	}
	return o.DNSLabel(s, path...)
}

// Namespace reports a name that no namespace can have.
func (o *Object) Namespace(s string, path ...any) bool {
	switch s {
	case "localhost": // RFC 6761, section 6.3: "localhost." and any names falling within ".localhost."
		o.Add(object.BadName, path, ` "localhost": NAME.localhost names the machine itself and never a service: want another name`)
		return false
	case "mesh":
		o.Add(object.BadName, path, ` "mesh": NAME.mesh is the mesh's own suffix and would be ambiguous: want another name`)
		return false
	}
	return o.DNSLabel(s, path...)
}

// Labels reports keys and values that labels cannot have.
func (o *Object) Labels(labels map[string]string, path ...any) bool {
	ok := o.Count(len(labels), 0, 64, path...)
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		at := append(slices.Clone(path), k)
		if len(k) > 253 || !labelKey.MatchString(k) {
			o.AddKey(object.BadFormat, at, "label key %q: want letters, digits, '-', '_' and '.', a letter or digit at both ends, at most 63 characters, behind an optional DNS prefix and slash", clip(k))
			ok = false
		}
		if v := labels[k]; len(v) > 63 || !labelValue.MatchString(v) {
			o.Add(object.BadFormat, at, " %q: want letters, digits, '-', '_' and '.', a letter or digit at both ends, at most 63 characters", clip(v))
			ok = false
		}
	}
	return ok
}

const maxDuration = 8760 * time.Hour

// Duration parses a duration in Go's syntax: zero, or 1ms to 8760h. It returns nil for nil and for
// what it reported.
func (o *Object) Duration(s *string, path ...any) *time.Duration {
	if s == nil || !o.Tree.Sound(path...) {
		return nil
	}
	d, err := time.ParseDuration(*s)
	switch {
	case err != nil:
		o.Add(object.BadFormat, path, " %q: want a duration such as 250ms, 2s or 1m30s", clip(*s))
		return nil
	case d < 0 || d > 0 && d < time.Millisecond || d > maxDuration:
		o.Add(object.OutOfRange, path, " %s: want 0s (none), or 1ms to 8760h", clip(*s))
		return nil
	}
	return &d
}

// gep2257 is the form of Gateway API durations. GEP-2257: "a strict subset of the syntax parsed by
// Golang time.ParseDuration", by the pattern of its type Duration.
var gep2257 = regexp.MustCompile(`^([0-9]{1,5}(h|m|s|ms)){1,4}$`)

// maxGatewayDuration is the longest that the standard form of GEP-2257 can write, which has each
// unit once.
const maxGatewayDuration = 100_000*time.Hour - time.Millisecond

// GatewayDuration parses a duration of the Gateway API. It returns nil for nil and for what it
// reported.
func (o *Object) GatewayDuration(s *string, path ...any) *time.Duration {
	if s == nil || !o.Tree.Sound(path...) {
		return nil
	}
	d, err := time.ParseDuration(*s)
	if err != nil || !gep2257.MatchString(*s) {
		o.Add(object.BadFormat, path, " %q: want a Gateway API duration: one to four of a whole number and h, m, s or ms, such as 2s or 1m30s", clip(*s))
		return nil
	}
	if d > maxGatewayDuration {
		o.Add(object.OutOfRange, path, " %s: want less than 100000h", *s)
		return nil
	}
	return &d
}

// clip shortens text for a message.
func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "..."
	}
	return s
}

// Quote quotes text for a message, shortened.
func Quote(s string) string { return strconv.Quote(clip(s)) }

// VersionName splits SERVICE.VERSION, the name of a ServiceVersion, and reports what is none.
func (o *Object) VersionName(s string, path ...any) (service, version string) {
	service, version, ok := strings.Cut(s, ".")
	if !ok || !IsDNSLabel(service) || !IsDNSLabel(version) {
		o.Add(object.BadName, path, " %q: want SERVICE.VERSION, such as orders.v1", clip(s))
		return "", ""
	}
	return service, version
}
