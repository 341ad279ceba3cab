package tree

import "strings"

// Nearest returns the word among those given that word is most likely a misspelling of, or
// nothing. Equal but for case always counts; otherwise a third of the letters may differ, at
// least one.
func Nearest(word string, among []string) string {
	best, bestDistance := "", max(1, len(word)/3)+1
	for _, a := range among {
		if strings.EqualFold(a, word) {
			return a
		}
		if len(a) > 64 || len(word) > 64 {
			continue
		}
		if d := distance(strings.ToLower(word), strings.ToLower(a)); d < bestDistance && d < len(word) {
			best, bestDistance = a, d
		}
	}
	return best
}

// distance is the number of letters to insert, remove, replace or swap with a neighbour.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			d := min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				d = min(d, rows[i-2][j-2]+1)
			}
			rows[i][j] = d
		}
	}
	return rows[len(a)][len(b)]
}
