// Package meshtest is a mesh inside `go test`: a control plane, its certificate authority and any
// number of services in one process, over connections in memory. What runs is the real thing: the
// control plane of the binary, the SDK that services import, xDS and mutual TLS between them.
//
//	mesh := meshtest.New(t)
//	mesh.Apply(`...YAML...`)
//	orders, web := mesh.Open("orders"), mesh.Open("web")
//
// It works under testing/synctest, where time stands still until everybody waits: timeouts,
// back-off and the rotation of certificates then take no time. Everything ends with the test.
// Tests import it; programs do not.
package meshtest
