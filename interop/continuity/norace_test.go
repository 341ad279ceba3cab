//go:build !race

package continuity

const raceFlag = "-race=false"
