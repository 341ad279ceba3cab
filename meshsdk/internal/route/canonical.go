package route

import "strings"

// Canonical gives the one spelling of path that is matched and forwarded, or false when there is
// none that every server reads alike. Both skins call it before a call begins and send what it
// returned: a route or policy then never looks at another path than the handler does. path carries
// no query.
//
// Normalised, because the specification calls the spellings equal:
//   - empty becomes "/", and a missing leading slash is added. RFC 9110, 4.2.3: "an empty path
//     component is equivalent to an absolute path of '/'". Servers of gRPC differ on
//     "pkg.Service/Method" without the slash; with it they agree.
//   - escaped unreserved bytes are decoded ("%61" is "a") and the other escapes are put in upper
//     case. RFC 3986, 6.2.2.2: unreserved ones "should be normalized by decoding"; 6.2.2.1.
//   - "." and ".." segments are removed. RFC 3986, 6.2.2.3: "URI normalizers should remove
//     dot-segments by applying the remove_dot_segments algorithm".
//
// Rejected, because a server may read another path than this client:
//   - "//": another resource by the RFC, the same by servers that merge slashes.
//   - "%2F", "%5C" and "\": net/http hands a handler "/" for the first, some servers for the others.
//   - ".." that leads above the root, an escape that is not two hex digits, "%00" and other escaped
//     control bytes, raw bytes that no path may hold (RFC 3986, 3.3, pchar: no controls, space,
//     quotes, "<", ">", "^", "{", "|", "}", "?", "#", non-ASCII).
func Canonical(path string) (string, bool) {
	switch state := inspect(path); state {
	case clean:
		return path, true
	case broken:
		return "", false
	default:
		return normalise(path)
	}
}

type verdict int

const (
	clean verdict = iota
	unclean
	broken
)

// inspect reads path once and allocates nothing: nearly every path is clean.
func inspect(path string) verdict {
	if path == "" || path[0] != '/' {
		return unclean
	}
	for i := 0; i < len(path); i++ {
		switch c := path[i]; {
		case c == '/':
			if i+1 < len(path) && (path[i+1] == '/' || path[i+1] == '.') {
				return unclean // or broken, or a name that starts with a dot: the slow way tells
			}
		case c == '%':
			return unclean
		case forbidden(c):
			return broken
		}
	}
	return clean
}

func forbidden(c byte) bool {
	switch c {
	case '\\', '?', '#', '"', '<', '>', '^', '`', '{', '|', '}':
		return true
	}
	return c <= ' ' || c >= 0x7f
}

func normalise(path string) (string, bool) {
	if path == "" {
		return "/", true
	}
	if path[0] != '/' {
		path = "/" + path
	}
	decoded := make([]byte, 0, len(path))
	for i := 0; i < len(path); i++ {
		c := path[i]
		if forbidden(c) {
			return "", false
		}
		if c != '%' {
			decoded = append(decoded, c)
			continue
		}
		if i+2 >= len(path) {
			return "", false
		}
		hi, ok1 := unhex(path[i+1])
		lo, ok2 := unhex(path[i+2])
		if !ok1 || !ok2 {
			return "", false
		}
		i += 2
		switch c := hi<<4 | lo; {
		case unreserved(c):
			decoded = append(decoded, c)
		case c == '/' || c == '\\' || c < ' ' || c == 0x7f:
			return "", false
		default:
			const digits = "0123456789ABCDEF"
			decoded = append(decoded, '%', digits[hi], digits[lo])
		}
	}
	segments := strings.Split(string(decoded[1:]), "/")
	kept := segments[:0]
	for i, s := range segments {
		last := i == len(segments)-1
		switch s {
		case "":
			if !last {
				return "", false // "//"
			}
			kept = append(kept, s) // a trailing slash, or "/" alone
		case ".", "..":
			if s == ".." {
				if len(kept) == 0 {
					return "", false // above the root
				}
				kept = kept[:len(kept)-1]
			}
			if last {
				kept = append(kept, "") // "/a/.." is "/", "/a/." is "/a/"
			}
		default:
			kept = append(kept, s)
		}
	}
	return "/" + strings.Join(kept, "/"), true
}

func unhex(c byte) (byte, bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10, true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// unreserved: RFC 3986, 2.3.
func unreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' ||
		c == '-' || c == '.' || c == '_' || c == '~'
}
