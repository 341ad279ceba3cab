//go:build race

package node

// raceFlag builds the binary as the tests are built: the race detector watches the daemons too.
const raceFlag = "-race"
