package tree

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"sigs.k8s.io/json"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
)

// maxWrong bounds how many wrong types of one document are looked for: each costs a decoding.
const maxWrong = 64

// Decode fills into, a pointer to a struct with json tags, and returns a finding for each unknown
// field and each value of a wrong type; those values are left zero, and Sound is false for them.
// It stops at 64 wrong types, and nothing of the tree is then sound.
// label begins each message: `MeshService "orders"`.
func (t *Tree) Decode(label string, into any) []object.Finding {
	var out []object.Finding
	target := reflect.ValueOf(into).Elem()
	for range maxWrong {
		target.SetZero()
		// "UnmarshalStrict ... a list of the strict failures (if any) are returned"; but the first
		// wrong type hides them and every other, so a wrong value is reported, put away as null,
		// and the rest is tried again.
		strict, err := json.UnmarshalStrict(t.JSON(), into)
		if err == nil {
			for _, s := range strict {
				out = append(out, t.unknown(label, s, target.Type()))
			}
			return out
		}
		n, f := t.wrongType(label, err)
		out = append(out, f)
		stuck := n.wrong || n == t
		n.wrong = true
		if stuck {
			break
		}
	}
	// The rest was not decoded, so nothing more can be said of it: Sound is false for all of it.
	t.wrong = true
	return out
}

// typeError is what the decoder's own UnmarshalTypeError has in common with that of encoding/json;
// its package is internal.
func typeError(err error) (offset int, typ reflect.Type, ok bool) {
	for ; err != nil; err = errors.Unwrap(err) {
		v := reflect.ValueOf(err)
		if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct || v.Elem().Type().Name() != "UnmarshalTypeError" {
			continue
		}
		typ, _ = v.Elem().FieldByName("Type").Interface().(reflect.Type)
		return int(v.Elem().FieldByName("Offset").Int()), typ, typ != nil
	}
	return 0, nil, false
}

func (t *Tree) wrongType(label string, err error) (*Tree, object.Finding) {
	offset, typ, ok := typeError(err)
	if !ok {
		return t, object.At(t.Pos, object.WrongType, "%s: %v", label, err)
	}
	n := t.at(offset)
	what := label
	if n.Path != "" {
		what += ": " + n.Path
	}
	return n, object.At(n.Pos, object.WrongType, "%s: %s: want %s", what, n.Describe(), wanted(typ, n))
}

func wanted(typ reflect.Type, n *Tree) string {
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	switch typ.Kind() {
	case reflect.String:
		if n.Kind == Number || n.Kind == Bool {
			return fmt.Sprintf("text: write %q in quotes", n.raw)
		}
		return "text"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		if n.Kind == Number && !strings.ContainsAny(n.literal, ".eE") {
			return fmt.Sprintf("a whole number that fits %d bits", typ.Bits())
		}
		if n.Kind == Text && decimal.MatchString(n.raw) {
			return "a whole number: write it without quotes"
		}
		return "a whole number"
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Map, reflect.Struct:
		return "a mapping"
	}
	return typ.String()
}

func (t *Tree) unknown(label string, err error, typ reflect.Type) object.Finding {
	var fe json.FieldError
	if !errors.As(err, &fe) {
		return object.At(t.Pos, object.UnknownField, "%s: %v", label, err)
	}
	path := fe.FieldPath()
	n := t.find(path)
	pos := t.Pos
	parent, name := "", path
	if n != nil {
		pos = n.KeyPos
	}
	if i := strings.LastIndexByte(path, '.'); i >= 0 {
		parent, name = path[:i], path[i+1:]
	}
	accepted := fieldsAt(typ, parent)
	msg := fmt.Sprintf("%s: %s: unknown field", label, path)
	if near := Nearest(name, accepted); near != "" {
		msg += fmt.Sprintf("; did you mean %q?", near)
	} else if len(accepted) > 0 && len(accepted) <= 16 {
		msg += "; accepted here: " + strings.Join(accepted, ", ")
	}
	return object.At(pos, object.UnknownField, "%s", msg)
}

// fieldsAt returns the names of the fields of the struct that path leads to, in order.
func fieldsAt(typ reflect.Type, path string) []string {
	for _, step := range strings.FieldsFunc(path, func(r rune) bool { return r == '.' }) {
		name, _, indexed := strings.Cut(step, "[")
		typ = fieldType(deref(typ), name)
		if typ == nil {
			return nil
		}
		if typ = deref(typ); indexed && typ.Kind() == reflect.Slice {
			typ = typ.Elem()
		}
	}
	if typ = deref(typ); typ.Kind() != reflect.Struct {
		return nil
	}
	var names []string
	for name := range fieldsOf(typ) {
		names = append(names, name)
	}
	return names
}

func deref(typ reflect.Type) reflect.Type {
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	return typ
}

func fieldType(typ reflect.Type, name string) reflect.Type {
	if typ.Kind() == reflect.Map {
		return typ.Elem()
	}
	if typ.Kind() == reflect.Struct {
		for n, t := range fieldsOf(typ) {
			if n == name {
				return t
			}
		}
	}
	return nil
}

// fieldsOf yields the JSON names of a struct, those of embedded structs among them.
func fieldsOf(typ reflect.Type) func(yield func(string, reflect.Type) bool) {
	return func(yield func(string, reflect.Type) bool) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch {
			case f.Anonymous && name == "" && deref(f.Type).Kind() == reflect.Struct:
				for n, t := range fieldsOf(deref(f.Type)) {
					if !yield(n, t) {
						return
					}
				}
			case name != "" && name != "-":
				if !yield(name, f.Type) {
					return
				}
			}
		}
	}
}
