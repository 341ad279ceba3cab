// Package differential compares the SDK with what it must agree with: grpc-go's own xDS client on
// the same control plane, call by call, and Envoy's own messages, field by field. Inputs are random
// and every test prints its seed; `go test -args -seed=N` repeats one.
//
// It has tests only.
package differential
