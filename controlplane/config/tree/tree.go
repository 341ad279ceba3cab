// Package tree reads YAML into a tree whose every value remembers its place, and decodes the tree
// strictly into Go structs: unknown fields and wrong types are findings at the line that holds
// them, all at once. package config and its translators call it.
//
// It knows no kinds. It never panics, and bounds what anchors may expand to.
package tree

import (
	"encoding/json"
	"strconv"
	"strings"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
)

// Kind is the shape of a value.
type Kind int

// Shapes of values.
const (
	Null Kind = iota
	Text
	Number
	Bool
	List
	Map
)

// Tree is one value of a document with everything below it.
type Tree struct {
	Kind Kind
	// Pos is where the value stands, KeyPos where its key does (Pos for what has no key).
	Pos, KeyPos object.Pos
	// Path is how messages call it: spec.rules[0].name. Empty for a document.
	Path string

	raw      string   // the scalar as written
	literal  string   // the scalar as JSON
	keys     []string // of a Map
	children []*Tree  // of a Map or List
	byKey    map[string]*Tree

	// wrong is set when the value has a type that its field cannot take: it was reported, and is
	// decoded as null.
	wrong      bool
	start, end int // the bytes it took in the JSON text encoded last
}

// Get returns the value at path below t, of keys (string) and indexes (int), or nil.
func (t *Tree) Get(path ...any) *Tree {
	for _, p := range path {
		if t == nil {
			return nil
		}
		switch p := p.(type) {
		case string:
			t = t.byKey[p]
		case int:
			if t.Kind != List || p < 0 || p >= len(t.children) {
				return nil
			}
			t = t.children[p]
		default:
			return nil
		}
	}
	return t
}

// Has reports whether something other than null was written at path, be it sound or not.
func (t *Tree) Has(path ...any) bool {
	n := t.Get(path...)
	return n != nil && (n.Kind != Null || n.wrong)
}

// Sound reports whether the value at path may be judged: neither it nor a value above it was
// reported as of a wrong type.
func (t *Tree) Sound(path ...any) bool {
	for i := range path {
		n := t.Get(path[:i+1]...)
		if n == nil {
			return true
		}
		if n.wrong {
			return false
		}
	}
	return !t.wrong
}

// At returns the place of the value at path, else of the nearest value above it that exists.
func (t *Tree) At(path ...any) object.Pos {
	for i := len(path); i > 0; i-- {
		if n := t.Get(path[:i]...); n != nil {
			if i < len(path) { // a field is missing in n: point at the key of n
				return n.KeyPos
			}
			return n.Pos
		}
	}
	return t.Pos
}

// KeyAt is At for the key of the value instead of the value.
func (t *Tree) KeyAt(path ...any) object.Pos {
	if n := t.Get(path...); n != nil {
		return n.KeyPos
	}
	return t.At(path...)
}

// Keys returns the keys of a mapping in the order of the file.
func (t *Tree) Keys() []string { return t.keys }

// Text returns a text scalar's value and whether it is one.
func (t *Tree) Text() (string, bool) {
	if t == nil || t.Kind != Text {
		return "", false
	}
	return t.raw, true
}

// Describe says what the value is, for messages: `text "a"`, "number 3", "a list".
func (t *Tree) Describe() string {
	switch t.Kind {
	case Text:
		return "text " + strconv.Quote(shorten(t.raw))
	case Number:
		return "number " + shorten(t.raw)
	case Bool:
		return t.raw
	case List:
		return "a list"
	case Map:
		return "a mapping"
	}
	return "nothing"
}

func shorten(s string) string {
	const most = 64
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}

// PathString spells a path as Tree.Path does.
func PathString(path ...any) string {
	var b strings.Builder
	for _, p := range path {
		switch p := p.(type) {
		case string:
			if b.Len() > 0 {
				b.WriteByte('.')
			}
			b.WriteString(p)
		case int:
			b.WriteByte('[')
			b.WriteString(strconv.Itoa(p))
			b.WriteByte(']')
		}
	}
	return b.String()
}

// JSON encodes the tree; values of a wrong type become null.
func (t *Tree) JSON() []byte { return t.appendJSON(nil) }

func (t *Tree) appendJSON(b []byte) []byte {
	t.start = len(b)
	switch {
	case t.wrong || t.Kind == Null:
		b = append(b, "null"...)
	case t.Kind == Map:
		b = append(b, '{')
		for i, c := range t.children {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, quoteJSON(t.keys[i])...)
			b = append(b, ':')
			b = c.appendJSON(b)
		}
		b = append(b, '}')
	case t.Kind == List:
		b = append(b, '[')
		for i, c := range t.children {
			if i > 0 {
				b = append(b, ',')
			}
			b = c.appendJSON(b)
		}
		b = append(b, ']')
	default:
		b = append(b, t.literal...)
	}
	t.end = len(b)
	return b
}

func quoteJSON(s string) []byte {
	q, err := json.Marshal(s)
	if err != nil { // a string always marshals
		return []byte(`""`)
	}
	return q
}

// at returns the innermost value that an error at this offset of the JSON text is about. Decoders
// report the byte after a scalar, and the byte after the bracket that opens a collection.
func (t *Tree) at(offset int) *Tree {
	for _, c := range t.children {
		if c.start < offset && offset <= c.end {
			return c.at(offset)
		}
	}
	return t
}

// find returns the value that a decoder calls path.
func (t *Tree) find(path string) *Tree {
	if t.Path == path {
		return t
	}
	for _, c := range t.children {
		if rest, ok := strings.CutPrefix(path, c.Path); ok && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			if n := c.find(path); n != nil {
				return n
			}
		}
	}
	return nil
}
