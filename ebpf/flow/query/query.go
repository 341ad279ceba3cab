// Package query gives the one language in which flows are asked for: `inlay observe` and the flow
// server parse it, and a flow either matches or does not.
//
//	from=billing and verdict=denied
//	to.address=10.0.0.0/8 or (bytes>10k and not reset)
//	port in (80, 8080) and rtt>5ms and from.label.version!=v2
//
// A query is made of comparisons FIELD OPERATOR VALUE, joined by `and`, `or`, `not` and
// parentheses; `and` binds closer than `or`. Operators are = != ~ !~ (regular expressions, RE2)
// < <= > >= and `in (a, b)`, `not in (a, b)`; which of them a field takes, its kind says. A value
// with blanks, parentheses or operators in it is quoted as in Go. Fields gives all fields.
//
// The package decides only: it has no clock, no network, no state, and never panics on any input.
package query

import (
	"fmt"
	"strings"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// MaxLength bounds a query, in bytes; MaxDepth how deep parentheses and `not` may be nested.
const (
	MaxLength = 4096
	MaxDepth  = 64
)

// Error is a fault in a query.
type Error struct {
	Column int    // of the fault, in characters from 1
	Text   string // what was found and what is accepted
}

func (e *Error) Error() string { return fmt.Sprintf("query: column %d: %s", e.Column, e.Text) }

// Query selects flows. It is never written after Parse and is safe for concurrent use.
type Query struct {
	root node // nil matches all
}

// Parse returns the query that text describes; an empty text matches every flow. The error is an
// *Error: it has the column of the fault and says what is accepted there.
func Parse(text string) (*Query, error) {
	if len(text) > MaxLength {
		return nil, &Error{Column: 1, Text: fmt.Sprintf("%d bytes long: want at most %d", len(text), MaxLength)}
	}
	tokens, err := lex(text)
	if err != nil {
		return nil, err
	}
	p := parser{tokens: tokens}
	if p.peek().kind == tokenEnd {
		return &Query{}, nil
	}
	root, err := p.or()
	if err != nil {
		return nil, err
	}
	if t := p.peek(); t.kind != tokenEnd {
		return nil, t.fault("want `and`, `or` or the end of the query, found %s", t)
	}
	return &Query{root: root}, nil
}

// Match reports whether the query selects f. A nil f matches only the empty query.
func (q *Query) Match(f *nodepb.Flow) bool { return q.root == nil || f != nil && q.root.match(f) }

// String returns the query in its canonical spelling, which parses to the same query.
func (q *Query) String() string {
	if q.root == nil {
		return ""
	}
	var b strings.Builder
	q.root.write(&b)
	return b.String()
}

// node is one step of a query.
type node interface {
	match(*nodepb.Flow) bool
	write(*strings.Builder)
}

// and, or hold at least two; a child is never of the same kind as its parent.
type (
	and []node
	or  []node
	not struct{ node }
)

func (n and) match(f *nodepb.Flow) bool {
	for _, c := range n {
		if !c.match(f) {
			return false
		}
	}
	return true
}

func (n or) match(f *nodepb.Flow) bool {
	for _, c := range n {
		if c.match(f) {
			return true
		}
	}
	return false
}

func (n not) match(f *nodepb.Flow) bool { return !n.node.match(f) }

func (n and) write(b *strings.Builder) {
	for i, c := range n {
		if i > 0 {
			b.WriteString(" and ")
		}
		_, paren := c.(or)
		writeParen(b, c, paren)
	}
}

func (n or) write(b *strings.Builder) {
	for i, c := range n {
		if i > 0 {
			b.WriteString(" or ")
		}
		c.write(b)
	}
}

func (n not) write(b *strings.Builder) {
	b.WriteString("not ")
	_, isAnd := n.node.(and)
	_, isOr := n.node.(or)
	writeParen(b, n.node, isAnd || isOr)
}

func writeParen(b *strings.Builder, n node, paren bool) {
	if !paren {
		n.write(b)
		return
	}
	b.WriteByte('(')
	n.write(b)
	b.WriteByte(')')
}
