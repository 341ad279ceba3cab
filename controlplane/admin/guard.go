package admin

import (
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

// guard lets through what a program of this machine sends, and stops what a browser sends for a
// page of somebody else: a page whose name was pointed at 127.0.0.1 shows in Host, a page of
// another origin in Origin or Sec-Fetch-Site. Reading is guarded like writing.
func guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !loopbackHost(r.Host) {
			http.Error(w, "host "+quote(r.Host)+": want localhost, 127.0.0.1 or [::1]", http.StatusForbidden)
			return
		}
		// "The Origin header ... same-origin": scheme, host and port are all those of this server
		// (RFC 6454, section 5); "null" is nobody's.
		if origin := r.Header.Values("Origin"); len(origin) > 0 {
			u, err := url.Parse(origin[0])
			if len(origin) > 1 || err != nil || u.Scheme != "http" || !strings.EqualFold(u.Host, r.Host) {
				http.Error(w, "origin "+quote(origin[0])+": want that of this address", http.StatusForbidden)
				return
			}
		} else if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
			// A cross-site GET of an image or script carries no Origin, but says so here (Fetch
			// Metadata Request Headers, section 2.4).
			http.Error(w, "request of another site ("+quote(site)+")", http.StatusForbidden)
			return
		}
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

// loopbackHost reports whether a Host header names this machine's loopback, at any port: a tunnel
// may have changed it.
func loopbackHost(host string) bool {
	name := host
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	if strings.EqualFold(name, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(name, "["), "]"))
	return err == nil && ip.Unmap().IsLoopback()
}

func quote(s string) string {
	if len(s) > 100 {
		s = s[:100]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}
