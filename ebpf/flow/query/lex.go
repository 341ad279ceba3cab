package query

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

type tokenKind int

const (
	tokenEnd    tokenKind = iota
	tokenWord             // unquoted
	tokenQuoted           // text is what was quoted
	tokenOp               // = != ~ !~ < <= > >=
	tokenOpen
	tokenClose
	tokenComma
)

type token struct {
	kind   tokenKind
	text   string
	column int
}

func (t token) String() string {
	switch t.kind {
	case tokenEnd:
		return "the end of the query"
	case tokenQuoted:
		return strconv.Quote(t.text)
	}
	return "`" + t.text + "`"
}

func (t token) fault(format string, args ...any) error {
	return &Error{Column: t.column, Text: fmt.Sprintf(format, args...)}
}

// is reports whether t is the keyword, in whatever case.
func (t token) is(keyword string) bool {
	return t.kind == tokenWord && strings.EqualFold(t.text, keyword)
}

// special ends an unquoted word.
func special(r rune) bool {
	return unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune(`()=!~<>,"'`+"`", r)
}

// lex splits a query; the last token is always tokenEnd.
func lex(text string) ([]token, error) {
	var out []token
	column := 1
	for len(text) > 0 {
		r, size := utf8.DecodeRuneInString(text)
		t := token{column: column}
		n := size
		switch {
		case r == utf8.RuneError && size == 1:
			return nil, t.fault("byte %#02x is not UTF-8", text[0])
		case unicode.IsSpace(r):
			text, column = text[size:], column+1
			continue
		case r == '(':
			t.kind = tokenOpen
		case r == ')':
			t.kind = tokenClose
		case r == ',':
			t.kind = tokenComma
		case r == '"' || r == '`':
			quoted, err := strconv.QuotedPrefix(text)
			if err != nil {
				return nil, t.fault("the quotation never ends, or holds a bad escape: want \"...\" as in Go")
			}
			t.kind, n = tokenQuoted, len(quoted)
			if t.text, err = strconv.Unquote(quoted); err != nil {
				return nil, t.fault("%s: want \"...\" as in Go", quoted)
			}
		case strings.ContainsRune("=~<>!", r):
			t.kind = tokenOp
			if r == '!' && !strings.HasPrefix(text[1:], "=") && !strings.HasPrefix(text[1:], "~") {
				return nil, t.fault("`!` alone: want != or !~, or `not` before a comparison")
			}
			if len(text) > 1 && (r == '!' || (r == '<' || r == '>') && text[1] == '=') {
				n = 2
			}
		case special(r):
			return nil, t.fault("%q: want a field, a value in \"...\", an operator or a parenthesis", r)
		default:
			t.kind = tokenWord
			if n = strings.IndexFunc(text, special); n < 0 {
				n = len(text)
			}
			if !utf8.ValidString(text[:n]) {
				return nil, t.fault("%q is not UTF-8", text[:n])
			}
		}
		if t.kind != tokenQuoted {
			t.text = text[:n]
		}
		out = append(out, t)
		column += utf8.RuneCountInString(text[:n])
		text = text[n:]
	}
	return append(out, token{kind: tokenEnd, column: column}), nil
}

// parser is a recursive descent over the tokens, as deep as MaxDepth.
type parser struct {
	tokens []token
	depth  int
}

func (p *parser) peek() token { return p.tokens[0] }

// next never passes the last token, tokenEnd.
func (p *parser) next() token {
	t := p.tokens[0]
	if t.kind != tokenEnd {
		p.tokens = p.tokens[1:]
	}
	return t
}

func (p *parser) or() (node, error) {
	var n or
	for {
		c, err := p.and()
		if err != nil {
			return nil, err
		}
		if same, ok := c.(or); ok {
			n = append(n, same...)
		} else {
			n = append(n, c)
		}
		if !p.peek().is("or") {
			break
		}
		p.next()
	}
	if len(n) == 1 {
		return n[0], nil
	}
	return n, nil
}

func (p *parser) and() (node, error) {
	var n and
	for {
		c, err := p.unary()
		if err != nil {
			return nil, err
		}
		if same, ok := c.(and); ok {
			n = append(n, same...)
		} else {
			n = append(n, c)
		}
		if !p.peek().is("and") {
			break
		}
		p.next()
	}
	if len(n) == 1 {
		return n[0], nil
	}
	return n, nil
}

func (p *parser) unary() (node, error) {
	t := p.peek()
	if p.depth++; p.depth > MaxDepth {
		return nil, t.fault("nested deeper than %d", MaxDepth)
	}
	defer func() { p.depth-- }()
	switch {
	case t.is("not"):
		p.next()
		c, err := p.unary()
		if err != nil {
			return nil, err
		}
		return not{c}, nil
	case t.kind == tokenOpen:
		p.next()
		c, err := p.or()
		if err != nil {
			return nil, err
		}
		if end := p.next(); end.kind != tokenClose {
			return nil, end.fault("want `)` for the `(` of column %d, found %s", t.column, end)
		}
		return c, nil
	}
	return p.comparison()
}

func (p *parser) comparison() (node, error) {
	t := p.next()
	if t.kind != tokenWord || t.is("and") || t.is("or") || t.is("in") {
		return nil, t.fault("want a field, `not` or `(`, found %s", t)
	}
	f, err := findField(t)
	if err != nil {
		return nil, err
	}
	op := p.peek()
	switch {
	case op.kind == tokenOp:
		p.next()
		v := p.next()
		if v.kind != tokenWord && v.kind != tokenQuoted {
			return nil, v.fault("want a value for %s, found %s; quote it if it holds blanks, parentheses or operators", f.name, v)
		}
		return f.compare(op, op.text, []token{v})
	case op.is("in"), op.is("not") && len(p.tokens) > 1 && p.tokens[1].is("in"):
		name := "in"
		if p.next().is("not") {
			p.next()
			name = "not in"
		}
		values, err := p.list(f)
		if err != nil {
			return nil, err
		}
		return f.compare(op, name, values)
	case f.kind == kindBool:
		return &comparison{field: f, op: "", equal: true}, nil
	}
	return nil, op.fault("want an operator after %s (one of %s), found %s", f.name, strings.Join(f.kind.operators(), " "), op)
}

func (p *parser) list(f field) ([]token, error) {
	if t := p.next(); t.kind != tokenOpen {
		return nil, t.fault("want ( after `in`, as in %s in (a, b), found %s", f.name, t)
	}
	var values []token
	for {
		v := p.next()
		if v.kind != tokenWord && v.kind != tokenQuoted {
			return nil, v.fault("want a value for %s, found %s", f.name, v)
		}
		values = append(values, v)
		switch t := p.next(); t.kind {
		case tokenComma:
		case tokenClose:
			return values, nil
		default:
			return nil, t.fault("want `,` or `)` in the list, found %s", t)
		}
	}
}
