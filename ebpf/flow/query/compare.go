package query

import (
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/inlay-mesh/inlay/xds/meshpb/nodepb"
)

// comparison is FIELD OPERATOR VALUE, decided: values are parsed, the regular expression compiled.
// It holds when it holds for any value that the flow has for the field; with negate, for none.
type comparison struct {
	field  field
	op     string   // as written; "" for a flag alone
	spell  []string // values as written
	list   bool     // in, not in
	negate bool     // !=, !~, not in
	equal  bool     // of flags: the value wanted

	texts    []string
	re       *regexp.Regexp
	numbers  []int64
	prefixes []netip.Prefix
}

// compare builds the comparison of f with values by op, which stands at the token at.
func (f field) compare(at token, op string, values []token) (node, error) {
	list := op == "in" || op == "not in"
	c := &comparison{field: f, op: op, list: list, negate: op == "!=" || op == "!~" || op == "not in"}
	name := op
	if list {
		name = "in"
	}
	if ops := f.kind.operators(); !slices.Contains(ops, name) {
		return nil, at.fault("%s does not take %s: want one of %s", f.name, op, strings.Join(ops, " "))
	}
	for _, v := range values {
		c.spell = append(c.spell, v.text)
		if err := c.add(v); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// add parses one value.
func (c *comparison) add(v token) error {
	f := c.field
	wrong := func() error { return v.fault("%s: want %s, found %s", f.name, f.kind.accepts(), v) }
	if strings.HasSuffix(c.op, "~") {
		re, err := regexp.Compile(v.text)
		if err != nil {
			return v.fault("%s: %v; want a regular expression of RE2, such as %s~\"^pay-.*\"", f.name, err, f.name)
		}
		c.re = re
		return nil
	}
	switch f.kind {
	case kindText, kindPeer:
		c.texts = append(c.texts, v.text)
	case kindWord:
		text := strings.ToLower(v.text)
		if !slices.Contains(f.words, text) {
			return v.fault("%s is never %s: want one of %s", f.name, v, strings.Join(f.words, ", "))
		}
		c.texts = append(c.texts, text)
	case kindNumber:
		n, err := strconv.ParseInt(v.text, 10, 64)
		if err != nil || n < 0 {
			return wrong()
		}
		if strings.HasSuffix(f.name, "port") && n > 65535 {
			return v.fault("%s: %d: want 0 to 65535", f.name, n)
		}
		c.numbers = append(c.numbers, n)
	case kindBytes:
		n, ok := parseBytes(v.text)
		if !ok {
			return wrong()
		}
		c.numbers = append(c.numbers, n)
	case kindDuration:
		d, err := time.ParseDuration(v.text)
		if err != nil || d < 0 {
			return wrong()
		}
		c.numbers = append(c.numbers, int64(d))
	case kindErrno:
		n, ok := parseErrno(v.text)
		if !ok {
			return wrong()
		}
		c.numbers = append(c.numbers, n)
	case kindAddress:
		p, ok := parseRange(v.text)
		if !ok {
			return wrong()
		}
		c.prefixes = append(c.prefixes, p)
	case kindBool:
		switch strings.ToLower(v.text) {
		case "true":
			c.equal = true
		case "false":
		default:
			return wrong()
		}
	}
	return nil
}

func (c *comparison) match(f *nodepb.Flow) bool { return c.any(f) != c.negate }

func (c *comparison) any(f *nodepb.Flow) bool {
	switch {
	case c.field.flag != nil:
		return c.field.flag(f) == c.equal
	case c.field.numbers != nil:
		return slices.ContainsFunc(c.field.numbers(f), c.number)
	case c.field.addresses != nil:
		return slices.ContainsFunc(c.field.addresses(f), func(a netip.Addr) bool {
			return slices.ContainsFunc(c.prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
		})
	case c.re != nil:
		return slices.ContainsFunc(c.field.texts(f), c.re.MatchString)
	}
	return slices.ContainsFunc(c.field.texts(f), c.text)
}

func (c *comparison) number(got int64) bool {
	switch c.op {
	case "<":
		return got < c.numbers[0]
	case "<=":
		return got <= c.numbers[0]
	case ">":
		return got > c.numbers[0]
	case ">=":
		return got >= c.numbers[0]
	}
	return slices.Contains(c.numbers, got)
}

func (c *comparison) text(got string) bool {
	for _, want := range c.texts {
		if got == want {
			return true
		}
		// billing is every billing.NAMESPACE.
		if c.field.kind == kindPeer && want != "" && !strings.Contains(want, ".") &&
			len(got) > len(want) && got[len(want)] == '.' && got[:len(want)] == want {
			return true
		}
	}
	return false
}

func (c *comparison) write(b *strings.Builder) {
	b.WriteString(c.field.name)
	if c.op == "" {
		return
	}
	if !c.list {
		b.WriteString(c.op)
		b.WriteString(spell(c.spell[0]))
		return
	}
	b.WriteString(" " + c.op + " (")
	for i, v := range c.spell {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(spell(v))
	}
	b.WriteByte(')')
}

// spell quotes v where it must be.
func spell(v string) string {
	quoted := strconv.Quote(v)
	if v == "" || strings.ContainsFunc(v, special) || quoted != `"`+v+`"` {
		return quoted
	}
	return v
}

var units = []struct {
	name string
	n    int64
}{
	{"ki", 1 << 10}, {"mi", 1 << 20}, {"gi", 1 << 30}, {"ti", 1 << 40},
	{"k", 1e3}, {"m", 1e6}, {"g", 1e9}, {"t", 1e12}, {"", 1},
}

// parseBytes reads 1500, 10k, 1.5M, 4Ki, each with B after it or not.
func parseBytes(text string) (int64, bool) {
	text = strings.TrimSuffix(strings.ToLower(text), "b")
	for _, u := range units {
		digits, ok := strings.CutSuffix(text, u.name)
		if !ok {
			continue
		}
		if digits == "" || strings.Trim(digits, "0123456789.") != "" {
			return 0, false
		}
		if n, err := strconv.ParseInt(digits, 10, 64); err == nil {
			return n * u.n, n <= (1<<63-1)/u.n
		}
		n, err := strconv.ParseFloat(digits, 64)
		if n *= float64(u.n); err != nil || n >= 1<<62 {
			return 0, false
		}
		return int64(n + 0.5), true
	}
	return 0, false
}

// parseRange reads an address as the range of itself, IPv4-mapped ones as IPv4.
func parseRange(text string) (netip.Prefix, bool) {
	if a, err := netip.ParseAddr(text); err == nil {
		a = a.Unmap().WithZone("")
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, false
	}
	if p.Addr().Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, false
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), true
}

// errnos are those that a refused call may return, by their number on Linux; the query may be
// parsed on another system.
var errnos = []struct {
	name string
	n    int64
}{
	{"EPERM", 1}, {"EACCES", 13}, {"ENETUNREACH", 101}, {"ETIMEDOUT", 110}, {"ECONNREFUSED", 111}, {"EHOSTUNREACH", 113},
}

func errnoNames() []string {
	var out []string
	for _, e := range errnos {
		out = append(out, e.name)
	}
	return out
}

func parseErrno(text string) (int64, bool) {
	for _, e := range errnos {
		if strings.EqualFold(e.name, text) {
			return e.n, true
		}
	}
	n, err := strconv.ParseInt(text, 10, 32)
	return n, err == nil && n >= 0
}
