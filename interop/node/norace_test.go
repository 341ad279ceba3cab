//go:build !race

package node

const raceFlag = "-race=false"
