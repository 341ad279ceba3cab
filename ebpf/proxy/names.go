package proxy

import "strings"

// lookup is how a name is answered: a pure consequence of the name, the suffix and the namespace of
// who asks.
type lookup struct {
	// keys are asked of the table in turn, NAME.NAMESPACE; the first that is there answers.
	keys []string
	// ours says that the name lies under the mesh's suffix: what the table does not hold does not
	// exist, and nobody else is asked.
	ours bool
	// apex says that the name is the suffix itself, which exists and has no address.
	apex bool
}

// plan says how to look a name up. name is in presentation format, in any case, with or without the
// dot at its end. Three forms are names of the mesh:
//
//	NAME                      in the namespace of who asks
//	NAME.NAMESPACE
//	NAME[.NAMESPACE].SUFFIX   and nothing else lives under the suffix
//
// The first two are shared with the rest of the world, so those that the table does not hold go on
// to a resolver.
func plan(name, suffix, namespace string) lookup {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if name == suffix {
		// A service may bear the suffix's name; without one, the name is that of a zone.
		return lookup{keys: keys(name, namespace), ours: true, apex: true}
	}
	if rest, ok := strings.CutSuffix(name, "."+suffix); ok {
		l := lookup{keys: keys(rest, namespace), ours: true}
		// NAME.NAMESPACE comes first, as it would without this suffix.
		if strings.Count(name, ".") == 1 {
			l.keys = append(keys(name, namespace), l.keys...)
		}
		return l
	}
	// RFC 6761, section 6.3: localhost and what is below it are the machine itself, whatever a table
	// holds.
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return lookup{}
	}
	return lookup{keys: keys(name, namespace)}
}

// keys are those that a name without suffix may be found under: none when it has another form.
func keys(name, namespace string) []string {
	first, second, two := strings.Cut(name, ".")
	if !two {
		second = namespace
	}
	if !isLabel(first) || !isLabel(second) {
		return nil
	}
	return []string{first + "." + second}
}

// isLabel reports whether s, in lower case, may be the name of a service or namespace. Escapes of
// the presentation format (\., \000) are not, so no byte of a query becomes a dot of a key.
func isLabel(s string) bool {
	if s == "" || len(s) > 63 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return true
}
