//go:build !race

package httpmesh_test

const raceEnabled = false
