// Package continuity tests what the node agent promises about its own death: the real binary is
// killed, stopped, upgraded and starved on the real kernel, while programs of the mesh call each other
// at 100 connections a second, and every call is counted at both ends.
//
// It has tests only, and needs root. The test binary runs itself in a network namespace of its own,
// where every port is free and nobody else's traffic passes; it is also the programs: TestMain runs one
// of the roles in roles_test.go when CONTINUITY_ROLE says so. Cgroups and pins bear a random name, and
// the outer process fails when one of that name is left.
package continuity
