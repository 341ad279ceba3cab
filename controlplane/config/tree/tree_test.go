package tree_test

import (
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
)

type inner struct {
	Name  string   `json:"name"`
	Count int      `json:"count"`
	On    bool     `json:"on"`
	List  []string `json:"list"`
}

type outer struct {
	inner
	Items []inner          `json:"items"`
	Named map[string]inner `json:"named"`
}

func parseOne(t *testing.T, text string) *tree.Tree {
	t.Helper()
	docs, findings := tree.Parse("f", []byte(text))
	if len(findings) > 0 || len(docs) != 1 {
		t.Fatalf("%d documents, findings %v; want one without findings", len(docs), findings)
	}
	return docs[0]
}

func TestPlaces(t *testing.T) {
	d := parseOne(t, "# c\nitems:\n- name: a\n  count: 3\n- {name: \"ä\", list: [x, y]}\n")
	for path, tc := range map[string]struct {
		at   object.Pos
		path []any
	}{
		"value":                        {object.Pos{File: "f", Line: 4, Col: 10}, []any{"items", 0, "count"}},
		"characters, not bytes":        {object.Pos{File: "f", Line: 5, Col: 25}, []any{"items", 1, "list", 1}},
		"missing: the one above":       {object.Pos{File: "f", Line: 3, Col: 3}, []any{"items", 0, "none"}},
		"missing: two levels above":    {object.Pos{File: "f", Line: 2, Col: 1}, []any{"items", 7, "none"}},
		"nothing of it: the document":  {object.Pos{File: "f", Line: 2, Col: 1}, []any{"none"}},
		"an index where a key is":      {object.Pos{File: "f", Line: 2, Col: 1}, []any{0}},
		"a key where an index belongs": {object.Pos{File: "f", Line: 2, Col: 1}, []any{"items", "name"}},
	} {
		if got := d.At(tc.path...); got != tc.at {
			t.Errorf("%s: At(%v) = %v, want %v", path, tc.path, got, tc.at)
		}
	}
	if got := d.KeyAt("items", 1, "list"); got.Col != 15 {
		t.Errorf("KeyAt = %v, want column 15", got)
	}
}

func TestDocumentsAreToldApart(t *testing.T) {
	for name, tc := range map[string]struct {
		text  string
		lines []int // at which each document begins
	}{
		"directive":                         {"%YAML 1.1\n---\na: 1\n", []int{3}},
		"comments first":                    {"# x\n\n---\na: 1\n---\nb: 1\n", []int{4, 6}},
		"empty ones are left out":           {"---\n---\n# x\n---\na: 1\n---\n", []int{5}},
		"content behind the marker":         {"--- {a: 1}\n--- \nb: 1\n", []int{1, 3}},
		"the end marker":                    {"a: 1\n...\n---\nb: 1\n", []int{1, 4}},
		"Windows":                           {"a: 1\r\n---\r\nb: 1\r\n", []int{1, 3}},
		"byte order mark":                   {"\uFEFFa: 1\n", []int{1}},
		"dashes that are no marker":         {"a: |\n  ---\n  x\nb: ----\n", []int{1}},
		"a fault in the middle":             {"a: 1\n---\nb: [\n---\nc: 1\n", []int{1, 5}},
		"a comment in front of the second ": {"a: 1\n# x\n---\n# y\nb: 1\n", []int{1, 5}},
	} {
		t.Run(name, func(t *testing.T) {
			docs, _ := tree.Parse("f", []byte(tc.text))
			var got []int
			for _, d := range docs {
				got = append(got, d.Pos.Line)
			}
			if len(got) != len(tc.lines) {
				t.Fatalf("documents at lines %v, want %v", got, tc.lines)
			}
			for i := range got {
				if got[i] != tc.lines[i] {
					t.Fatalf("documents at lines %v, want %v", got, tc.lines)
				}
			}
		})
	}
}

func TestDecodeReportsEverythingAtOnce(t *testing.T) {
	d := parseOne(t, `
name: 1
count: x
on: "true"
list: {a: b}
nme: y
items:
- count: 1.5
  list: [1, [x], ok]
- 3
named:
  a.b: {count: [], cuont: 1}
`)
	var into outer
	findings := object.SortFindings(d.Decode("thing", &into))
	var got strings.Builder
	for _, f := range findings {
		got.WriteString(f.String() + "\n")
	}
	want := `f:2:7 INL1006 thing: name: number 1: want text: write "1" in quotes
f:3:8 INL1006 thing: count: text "x": want a whole number
f:4:5 INL1006 thing: on: text "true": want true or false
f:5:7 INL1006 thing: list: a mapping: want a list
f:6:1 INL1005 thing: nme: unknown field; did you mean "name"?
f:8:10 INL1006 thing: items[0].count: number 1.5: want a whole number
f:9:10 INL1006 thing: items[0].list[0]: number 1: want text: write "1" in quotes
f:9:13 INL1006 thing: items[0].list[1]: a list: want text
f:10:3 INL1006 thing: items[1]: number 3: want a mapping
f:12:16 INL1006 thing: named.a.b.count: a list: want a whole number
f:12:20 INL1005 thing: named.a.b.cuont: unknown field
`
	if got.String() != want {
		t.Errorf("findings:\n%swant:\n%s", got.String(), want)
	}
	if d.Sound("name") || d.Sound("items", 1, "name") || !d.Sound("items", 0, "name") {
		t.Error("Sound is wrong about what was reported")
	}
	if len(into.Items) != 2 || len(into.Items[0].List) != 3 || into.Items[0].List[2] != "ok" {
		t.Errorf("the sound values were not decoded: %+v", into)
	}
}

func TestDecodeStopsWhereNothingFits(t *testing.T) {
	d := parseOne(t, "items: ["+strings.Repeat("1, ", 200)+"1]\n")
	var into outer
	if got := len(d.Decode("thing", &into)); got != 64 {
		t.Errorf("%d findings, want the bound of 64", got)
	}
	if d.Sound("items", 0) || d.Sound() {
		t.Error("what was not decoded counts as sound")
	}
}

func TestNearest(t *testing.T) {
	words := []string{"port", "protocol", "rules", "unavailable"}
	for word, want := range map[string]string{
		"prot": "port", "Port": "port", "protokol": "protocol", "rulse": "rules", "unavvailable": "unavailable",
		"": "", "x": "", "zzz": "", "backends": "", strings.Repeat("p", 1000): "",
	} {
		if got := tree.Nearest(word, words); got != want {
			t.Errorf("Nearest(%q) = %q, want %q", word, got, want)
		}
	}
}
