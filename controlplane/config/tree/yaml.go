package tree

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
)

const (
	maxDepth = 64
	// maxExpanded bounds what the aliases of one file may add, in bytes of values and keys and a
	// constant for each value.
	maxExpanded = 4 << 20
	nodeCost    = 64
)

// Parse reads every document of a file. Documents without content are left out. A document with a
// fault of syntax is reported and skipped; the others are returned all the same.
func Parse(file string, data []byte) ([]*Tree, []object.Finding) {
	r := &reader{file: file}
	if !utf8.Valid(data) {
		line, col := 1, 1
		for i := 0; i < len(data); {
			c, n := utf8.DecodeRune(data[i:])
			if c == utf8.RuneError && n == 1 {
				break
			}
			if col++; c == '\n' {
				line, col = line+1, 1
			}
			i += n
		}
		r.fault(object.Pos{File: file, Line: line, Col: col}, object.YAMLSyntax, "a byte that is not UTF-8: want text in UTF-8")
		return nil, r.findings
	}
	data = bytes.TrimPrefix(data, []byte("\uFEFF"))
	for _, part := range split(data) {
		r.part(part)
	}
	return r.docs, r.findings
}

// part is the text of one document, or of several that the decoder tells apart.
type part struct {
	text  []byte
	lines int // before it in the file
}

// split cuts a file at the lines that begin a document, so that a fault in one leaves the others
// readable. YAML 1.2, section 9.1.2: a line that begins with "---" can be nothing else, not even
// inside a scalar ("c-forbidden").
func split(data []byte) []part {
	var parts []part
	line, start, startLine := 0, 0, 0
	content := false // whether the part holds more than directives, comments and blank lines
	for at := 0; at < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		text := bytes.TrimRight(data[at:end], "\r\n")
		if marker := bytes.HasPrefix(text, []byte("---")) && (len(text) == 3 || text[3] == ' ' || text[3] == '\t'); marker {
			if content {
				parts = append(parts, part{data[start:at], startLine})
				start, startLine = at, line
			}
			content = true
		} else if t := bytes.TrimLeft(text, " \t"); len(t) > 0 && t[0] != '#' && text[0] != '%' {
			content = true
		}
		at = end
	}
	return append(parts, part{data[start:], startLine})
}

type reader struct {
	file     string
	lines    int // before the part being read
	docs     []*Tree
	findings []object.Finding
	expanded int                 // cost of what aliases added to this file
	open     map[*yaml.Node]bool // anchors being expanded
	broken   bool                // the document broke a bound: it was reported
}

func (r *reader) fault(p object.Pos, c object.Code, format string, args ...any) {
	r.findings = append(r.findings, object.At(p, c, format, args...))
}

// yamlLine finds the line in the texts of the YAML library: "yaml: line 3: did not find ...".
var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

func (r *reader) part(p part) {
	r.lines = p.lines
	dec := yaml.NewDecoder(bytes.NewReader(p.text))
	for {
		var doc yaml.Node
		err := decodeNode(dec, &doc)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			r.syntax(p, err)
			return
		}
		if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 {
			continue
		}
		r.open, r.broken = map[*yaml.Node]bool{}, false
		t := r.value(doc.Content[0], "", 0, false)
		if t != nil && !r.broken && t.Kind != Null {
			t.KeyPos = t.Pos
			r.docs = append(r.docs, t)
		}
	}
}

// decodeNode guards against a panic of the library: no bytes may end the control plane.
func decodeNode(dec *yaml.Decoder, doc *yaml.Node) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("yaml: %v", p)
		}
	}()
	return dec.Decode(doc)
}

// parserFault recognises the faults of the library's parser, whose line counts from 0; those of its
// scanner count from 1.
var parserFault = regexp.MustCompile(`^(did not find expected|found duplicate %|found incompatible|found undefined tag handle)`)

func (r *reader) syntax(p part, err error) {
	msg := err.Error()
	m := yamlLine.FindStringSubmatch(msg)
	line := 1
	if m != nil {
		msg = msg[len(m[0]):]
		if n, err := strconv.Atoi(m[1]); err == nil {
			line = n
			if parserFault.MatchString(msg) {
				line++
			}
		}
	}
	lines := strings.Split(string(p.text), "\n")
	line = max(1, min(line, len(lines)))
	// The library says "found character that cannot start any token" of a tab, at its line or the
	// one before.
	for _, l := range []int{line, line + 1} {
		if l <= len(lines) {
			text := lines[l-1]
			indent := text[:len(text)-len(strings.TrimLeft(text, " \t"))]
			if i := strings.IndexByte(indent, '\t'); i >= 0 && strings.TrimSpace(text) != "" {
				r.fault(object.Pos{File: r.file, Line: r.lines + l, Col: i + 1}, object.YAMLSyntax, "a tab in the indentation: want spaces")
				return
			}
		}
	}
	text := lines[line-1]
	col := len(text) - len(strings.TrimLeft(text, " ")) + 1
	if strings.HasPrefix(msg, "found incompatible") {
		msg = "a %YAML directive of a version that is not read here: remove it"
	}
	r.fault(object.Pos{File: r.file, Line: r.lines + line, Col: col}, object.YAMLSyntax, "not YAML: %s", msg)
}

func (r *reader) pos(n *yaml.Node) object.Pos {
	return object.Pos{File: r.file, Line: r.lines + max(1, n.Line), Col: max(1, n.Column)}
}

// value turns n into a tree, with aliases expanded. It returns nil for what was reported.
func (r *reader) value(n *yaml.Node, path string, depth int, aliased bool) *Tree {
	if r.broken {
		return nil
	}
	if depth > maxDepth {
		r.broken = true
		r.fault(r.pos(n), object.YAMLFeature, "nested deeper than %d levels: want fewer", maxDepth)
		return nil
	}
	if aliased && !r.charge(n, len(n.Value)+len(path)) {
		return nil
	}
	t := &Tree{Pos: r.pos(n), Path: path}
	t.KeyPos = t.Pos
	switch n.Kind {
	case yaml.AliasNode:
		if n.Alias == nil || r.open[n.Alias] {
			r.broken = true
			r.fault(r.pos(n), object.YAMLFeature, "alias *%s is inside its own anchor", n.Value)
			return nil
		}
		r.open[n.Alias] = true
		defer delete(r.open, n.Alias)
		return r.value(n.Alias, path, depth+1, true)
	case yaml.MappingNode:
		if !r.plainTag(n, "!!map") {
			return nil
		}
		t.Kind = Map
		t.byKey = map[string]*Tree{}
		r.mapping(t, n, depth, aliased)
		return t
	case yaml.SequenceNode:
		if !r.plainTag(n, "!!seq") {
			return nil
		}
		t.Kind = List
		for i, c := range n.Content {
			child := r.value(c, path+"["+strconv.Itoa(i)+"]", depth+1, aliased)
			if child != nil && child.Kind == Null {
				r.fault(r.pos(c), object.YAMLFeature, "an empty entry in a list: write its value, or remove it")
				child = nil
			}
			if child == nil {
				// Keep the indexes of those behind it.
				child = &Tree{Pos: r.pos(c), KeyPos: r.pos(c), Path: path + "[" + strconv.Itoa(i) + "]", wrong: true}
			}
			t.children = append(t.children, child)
		}
		return t
	case yaml.ScalarNode:
		if !r.scalar(t, n) {
			return nil
		}
		return t
	}
	return nil
}

// charge counts what an alias adds and reports whether the file may still have it.
func (r *reader) charge(n *yaml.Node, bytes int) bool {
	if r.expanded += nodeCost + bytes; r.expanded <= maxExpanded {
		return true
	}
	if !r.broken {
		r.broken = true
		r.fault(r.pos(n), object.YAMLFeature, "the aliases of this file expand to more than %d MiB: write the values out", maxExpanded>>20)
	}
	return false
}

func (r *reader) plainTag(n *yaml.Node, want string) bool {
	if n.Style&yaml.TaggedStyle == 0 || n.ShortTag() == want {
		return true
	}
	r.fault(r.pos(n), object.YAMLFeature, "tag %s: tags are not accepted here", n.Tag)
	return false
}

func (r *reader) mapping(t *Tree, n *yaml.Node, depth int, aliased bool) {
	var merged []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if k.Kind == yaml.AliasNode && k.Alias != nil {
			k = k.Alias
		}
		if k.Kind == yaml.ScalarNode && k.ShortTag() == "!!merge" {
			merged = append(merged, v)
			continue
		}
		if k.Kind != yaml.ScalarNode || k.ShortTag() != "!!str" {
			what := "a list or mapping"
			if k.Kind == yaml.ScalarNode {
				what = shorten(k.Value)
				if what == "" {
					what = "nothing"
				}
			}
			r.fault(r.pos(k), object.YAMLFeature, "key %s is not text: want text, in quotes if it looks like a number, true, false or null", what)
			continue
		}
		if aliased && !r.charge(k, len(k.Value)) {
			return
		}
		if first, ok := t.byKey[k.Value]; ok {
			r.fault(r.pos(k), object.DuplicateKey, "key %q is here twice, first at line %d: remove one", shorten(k.Value), first.KeyPos.Line)
			continue
		}
		r.put(t, k, v, depth, aliased)
	}
	// YAML merge keys: what the mapping itself says wins, then the first of several.
	for _, m := range merged {
		list := []*yaml.Node{m}
		if m.Kind == yaml.SequenceNode {
			list = m.Content
		}
		for _, v := range list {
			if v.Kind == yaml.AliasNode && v.Alias != nil {
				v = v.Alias
			}
			if v.Kind != yaml.MappingNode || r.open[v] {
				r.fault(r.pos(m), object.YAMLFeature, "merge key <<: want the alias of a mapping, or a list of such")
				continue
			}
			if depth > maxDepth || !r.charge(v, 0) {
				if !r.broken {
					r.broken = true
					r.fault(r.pos(v), object.YAMLFeature, "nested deeper than %d levels: want fewer", maxDepth)
				}
				return
			}
			r.open[v] = true
			from := &Tree{Kind: Map, byKey: map[string]*Tree{}, Path: t.Path}
			r.mapping(from, v, depth+1, true)
			delete(r.open, v)
			for i, k := range from.keys {
				if _, ok := t.byKey[k]; !ok {
					t.add(k, from.children[i])
				}
			}
		}
		if r.broken {
			return
		}
	}
}

func (r *reader) put(t *Tree, k, v *yaml.Node, depth int, aliased bool) {
	path := k.Value
	if t.Path != "" {
		path = t.Path + "." + k.Value
	}
	child := r.value(v, path, depth+1, aliased)
	if child == nil {
		child = &Tree{Pos: r.pos(v), Path: path, wrong: true}
	}
	child.KeyPos = r.pos(k)
	t.add(k.Value, child)
}

func (t *Tree) add(key string, child *Tree) {
	t.keys = append(t.keys, key)
	t.children = append(t.children, child)
	t.byKey[key] = child
}

var decimal = regexp.MustCompile(`^[-+]?(0|[1-9][0-9]*)$`)

func (r *reader) scalar(t *Tree, n *yaml.Node) bool {
	t.raw = n.Value
	switch n.ShortTag() {
	case "!!null":
		t.Kind = Null
	case "!!str", "!!timestamp": // a date is text here, as in Kubernetes
		t.Kind, t.literal = Text, string(quoteJSON(n.Value))
	case "!!bool":
		var v bool
		if err := n.Decode(&v); err != nil {
			r.fault(r.pos(n), object.YAMLFeature, "%q is not true or false", shorten(n.Value))
			return false
		}
		t.Kind, t.literal = Bool, strconv.FormatBool(v)
	case "!!int":
		if !decimal.MatchString(n.Value) {
			r.fault(r.pos(n), object.YAMLFeature, "number %s: want it in decimal without leading zeros, or in quotes if text is meant", shorten(n.Value))
			return false
		}
		t.Kind, t.literal = Number, strings.TrimPrefix(n.Value, "+")
	case "!!float":
		var v float64
		if err := n.Decode(&v); err != nil || math.IsInf(v, 0) || math.IsNaN(v) {
			r.fault(r.pos(n), object.YAMLFeature, "number %s: want a finite one", shorten(n.Value))
			return false
		}
		t.Kind, t.literal = Number, strconv.FormatFloat(v, 'g', -1, 64)
	default:
		r.fault(r.pos(n), object.YAMLFeature, "tag %s: tags are not accepted here", shorten(n.Tag))
		return false
	}
	return true
}
