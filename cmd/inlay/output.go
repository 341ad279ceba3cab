package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"unicode"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// format is what -o asks for.
type format string

const (
	formatTable format = ""
	formatJSON  format = "json"
	formatYAML  format = "yaml"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "format" }

// Set accepts json and yaml.
func (f *format) Set(s string) error {
	switch format(s) {
	case formatJSON, formatYAML:
		*f = format(s)
		return nil
	}
	return fmt.Errorf("want json or yaml")
}

func outputFlag(c *cobra.Command, f *format) {
	c.Flags().VarP(f, "output", "o", "print json or yaml instead of a table")
}

// jsonOf writes m with the field names of the .proto files, zero values included, so that every
// reader finds the same fields.
func jsonOf(m proto.Message) ([]byte, error) {
	raw, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer // protojson varies its blanks on purpose; Indent makes them the same each time
	err = json.Indent(&b, raw, "", "  ")
	b.WriteByte('\n')
	return b.Bytes(), err
}

// print writes m as asked: as a table by the given function, else as JSON or YAML.
func (f format) print(w io.Writer, m proto.Message, table func(*tabwriter.Writer)) error {
	if f == formatTable {
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		table(tw)
		return tw.Flush()
	}
	raw, err := jsonOf(m)
	if err != nil {
		return err
	}
	if f == formatYAML {
		if raw, err = yamlOf(raw); err != nil {
			return err
		}
	}
	_, err = w.Write(raw)
	return err
}

// printValue is print for values that are no protobuf.
func (f format) printValue(w io.Writer, v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	raw = append(raw, '\n')
	if f == formatYAML {
		if raw, err = yamlOf(raw); err != nil {
			return err
		}
	}
	_, err = w.Write(raw)
	return err
}

// yamlOf turns JSON into YAML in block style, keeping the order of the fields.
func yamlOf(raw []byte) ([]byte, error) {
	var n yaml.Node
	if err := yaml.Unmarshal(raw, &n); err != nil {
		return nil, err
	}
	unflow(&n)
	return yaml.Marshal(&n)
}

// unflow takes brackets and quotes away where YAML needs none: the encoder puts back what it needs.
func unflow(n *yaml.Node) {
	n.Style &^= yaml.FlowStyle
	if n.Kind == yaml.ScalarNode && legible(n.Value) {
		n.Style = 0
	}
	for _, c := range n.Content {
		unflow(c)
	}
}

// legible says whether a string survives as a plain or a block scalar. The encoder writes blocks that
// begin with a tab or hold one as indentation, which no parser takes back; such strings stay quoted.
func legible(s string) bool {
	if strings.HasPrefix(s, " ") || strings.HasPrefix(s, "\n") {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) })
}

// dash stands for an empty cell.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
