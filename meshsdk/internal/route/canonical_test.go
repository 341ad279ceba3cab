package route_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/inlay-mesh/inlay/meshsdk/internal/route"
)

func TestCanonical(t *testing.T) {
	for name, tc := range map[string]struct {
		in, want string
		ok       bool
	}{
		"a plain path is kept":                          {"/v1/orders/7", "/v1/orders/7", true},
		"the root is kept":                              {"/", "/", true},
		"empty means the root":                          {"", "/", true},
		"a gRPC path without slash gets one":            {"shop.Orders/Get", "/shop.Orders/Get", true},
		"a trailing slash is kept":                      {"/a/", "/a/", true},
		"case is kept":                                  {"/Admin", "/Admin", true},
		"escaped letters are decoded":                   {"/%61dmin", "/admin", true},
		"escaped dots are dots":                         {"/a/%2e%2E/admin", "/admin", true},
		"escapes are in upper case":                     {"/a%3ab", "/a%3Ab", true},
		"a reserved byte stays escaped":                 {"/a%20b", "/a%20b", true},
		"an escaped percent is not decoded again":       {"/%252f", "/%252f", true},
		"one dot is removed":                            {"/a/./b", "/a/b", true},
		"two dots remove a segment":                     {"/a/../b", "/b", true},
		"a dot at the end leaves a directory":           {"/a/.", "/a/", true},
		"two dots at the end leave a directory":         {"/a/b/..", "/a/", true},
		"up to the root is the root":                    {"/a/..", "/", true},
		"a name that starts with a dot is a name":       {"/.well-known/x", "/.well-known/x", true},
		"three dots are a name":                         {"/.../x", "/.../x", true},
		"UTF-8 comes escaped and stays so":              {"/caf%c3%a9", "/caf%C3%A9", true},
		"above the root is refused":                     {"/../admin", "", false},
		"above the root by way of a segment is refused": {"/a/../../admin", "", false},
		"two slashes are refused":                       {"//admin", "", false},
		"two slashes within are refused":                {"/a//admin", "", false},
		"two slashes at the end are refused":            {"/a//", "", false},
		"two slashes made by dots are refused":          {"/a/.//b", "", false},
		"an escaped slash is refused":                   {"/a%2Fadmin", "", false},
		"an escaped slash in lower case is refused":     {"/a%2fadmin", "", false},
		"a backslash is refused":                        {`/a\admin`, "", false},
		"an escaped backslash is refused":               {"/a%5cadmin", "", false},
		"a query is refused":                            {"/a?b", "", false},
		"a fragment is refused":                         {"/a#b", "", false},
		"a quote is refused":                            {`/a"b`, "", false},
		"brackets and delimiters of a segment are kept": {"/a[1];b=c,d:e@f!$&'()*+", "/a[1];b=c,d:e@f!$&'()*+", true},
		"a space is refused":                            {"/a b", "", false},
		"a raw byte above ASCII is refused":             {"/caf\xc3\xa9", "", false},
		"an escaped zero is refused":                    {"/a%00", "", false},
		"an escaped line feed is refused":               {"/a%0a", "", false},
		"a broken escape is refused":                    {"/a%2", "", false},
		"an escape that is no hex is refused":           {"/a%zz", "", false},
		"the asterisk form is a path of its own":        {"*", "/*", true},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := route.Canonical(tc.in)
			if got != tc.want || ok != tc.ok {
				t.Errorf("Canonical(%q) = %q, %v; want %q, %v", tc.in, got, ok, tc.want, tc.ok)
			}
		})
	}
}

// Match on what is forwarded: of a canonical path net/http's mux must not find another handler
// than the one that the path names, which is what a redirect to a cleaned path would be.
func FuzzCanonical(f *testing.F) {
	for _, s := range []string{"/", "", "a/b", "/a/../b", "//", "/%2e%2e/", "/a%2fb", "/.%2e/x", "/%25%32%66", "/a/.//b", "/a%5c", "/%c3%a9"} {
		f.Add(s)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) })
	f.Fuzz(func(t *testing.T, in string) {
		got, ok := route.Canonical(in)
		if !ok {
			if got != "" {
				t.Fatalf("Canonical(%q) refuses with %q", in, got)
			}
			return
		}
		if again, ok := route.Canonical(got); !ok || again != got {
			t.Fatalf("Canonical(%q) = %q, of which it is %q, %v", in, got, again, ok)
		}
		if got[0] != '/' || strings.Contains(got, "//") || strings.Contains(strings.ToLower(got), "%2f") ||
			strings.Contains(got+"/", "/../") || strings.Contains(got+"/", "/./") {
			t.Fatalf("Canonical(%q) = %q is not canonical", in, got)
		}
		req := httptest.NewRequest(http.MethodGet, got, nil)
		if sent := req.URL.EscapedPath(); sent != got {
			t.Fatalf("Canonical(%q) = %q, net/http sends %q", in, got, sent)
		}
		rec := httptest.NewRecorder()
		mux.ServeHTTP(rec, req)
		if rec.Code != http.StatusNoContent {
			t.Fatalf("Canonical(%q) = %q: the mux answers %d %s", in, got, rec.Code, rec.Header().Get("Location"))
		}
	})
}

func TestCanonicalOfACleanPathAllocatesNothing(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() { route.Canonical("/shop.Orders/Get") }); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}
