package call

import (
	"slices"
	"strings"
)

// nearest is a hint for a name that does not exist: the known names most like it.
func (e *Engine) nearest(name string) string {
	seen := map[string]bool{name: true}
	var known []string
	add := func(n string) {
		if !seen[n] {
			seen[n] = true
			known = append(known, n)
		}
	}
	for n, svc := range e.Snapshot().Services {
		if svc.Err == nil {
			add(n)
		}
	}
	if e.cfg.Known != nil {
		for _, n := range e.cfg.Known() {
			add(n)
		}
	}
	type scored struct {
		name string
		far  int
	}
	var close []scored
	for _, n := range known {
		if far := distance(name, n); far <= max(2, len(name)/3) {
			close = append(close, scored{n, far})
		}
	}
	if len(close) == 0 {
		return "`inlay get services` lists those that exist"
	}
	slices.SortFunc(close, func(a, b scored) int {
		if a.far != b.far {
			return a.far - b.far
		}
		return strings.Compare(a.name, b.name)
	})
	close = close[:min(len(close), 3)]
	var quoted []string
	for _, s := range close {
		quoted = append(quoted, `"`+s.name+`"`)
	}
	return "did you mean " + strings.Join(quoted, " or ") + "?"
}

// distance is how many bytes must be inserted, removed or replaced to make a of b (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
