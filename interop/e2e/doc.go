// Package e2e tests the mesh with real processes: `inlay dev` with its two daemons, programs below
// `inlay run`, signals, kill -9, files that change. Calls are counted at both ends.
//
// It has tests only. The test binary is also the programs: TestMain runs one of the roles in
// roles_test.go when E2E_ROLE says so.
package e2e
