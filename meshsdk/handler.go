package meshsdk

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/inlay-mesh/inlay/meshsdk/internal/tcpmesh"
)

// Handler answers questions about the Mesh; mount it where probes and operators reach it:
//
//	GET /livez    200 while the process is of use
//	GET /readyz   200 when traffic may come; 503 and the reason before, and from Shutdown on
//	GET /status   Status as JSON
//	GET /config   the configuration in use as JSON: services, routes, clusters, endpoints
//	GET /explain?method=GET&url=http://orders/v1/7&header=Name:value   a Decision as JSON
//
// Nothing is changed by any of them. All but the probes answer callers of this machine (with a
// Host of this machine: a page in a browser cannot ask) and callers with an SVID only.
func (m *Mesh) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) {
		if m.stage.Load() == stageClosed {
			probe(w, errClosed)
			return
		}
		probe(w, nil)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { probe(w, m.notReady()) })
	mux.Handle("GET /status", private(func(w http.ResponseWriter, r *http.Request) { writeJSON(w, http.StatusOK, m.Status()) }))
	mux.Handle("GET /config", private(func(w http.ResponseWriter, r *http.Request) { writeJSON(w, http.StatusOK, m.dump()) }))
	mux.Handle("GET /explain", private(m.serveExplain))
	return mux
}

func probe(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, err)
		return
	}
	fmt.Fprintln(w, "ok")
}

func (m *Mesh) serveExplain(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	header := http.Header{}
	for _, line := range q["header"] {
		name, value, ok := strings.Cut(line, ":")
		if !ok || name == "" {
			writeJSON(w, http.StatusBadRequest, map[string]string{"error": fmt.Sprintf("header %q: want NAME:VALUE", line)})
			return
		}
		header.Add(strings.TrimSpace(name), strings.TrimSpace(value))
	}
	if q.Get("url") == "" {
		writeJSON(w, http.StatusBadRequest, map[string]string{"error": "url is missing: want /explain?method=GET&url=http://SERVICE/PATH"})
		return
	}
	d, err := m.Explain(r.Context(), q.Get("method"), q.Get("url"), header)
	if err != nil {
		writeJSON(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
		return
	}
	writeJSON(w, http.StatusOK, d)
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // a client that is gone
}

// private lets callers of this machine and callers with an SVID through.
func private(h http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := mayAsk(r); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		h(w, r)
	})
}

// mayAsk refuses other machines, and pages that a browser of this machine shows: those of another
// origin, and those whose name was made to point here (DNS rebinding).
func mayAsk(r *http.Request) error {
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		if c, ok := tcpmesh.FromAddr(a); ok {
			if _, ok := c.Peer(); ok {
				return nil // no browser has an SVID
			}
		}
	}
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !remote.Addr().Unmap().IsLoopback() {
		return fmt.Errorf("%s is not of this machine: ask over loopback, or with an SVID over a port of the mesh", r.RemoteAddr)
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	if host != "localhost" && (err != nil || !ip.Unmap().IsLoopback()) {
		return fmt.Errorf("host %q is not of this machine: want localhost or 127.0.0.1", r.Host)
	}
	if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
		return errors.New("asked by a page of another origin")
	}
	if origin := r.Header.Get("Origin"); origin != "" && origin != "http://"+r.Host && origin != "https://"+r.Host {
		return fmt.Errorf("asked by a page of origin %q", origin)
	}
	return nil
}
