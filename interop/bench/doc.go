// Package bench measures the SDK beside what a program would use without it, in one process and one
// run: callers in a closed loop over loopback TCP with mutual TLS, 100 bytes each way, the two in
// rotated rounds, so that a machine whose speed drifts does not favour one of them. Figures are
// ratios, of CPU, median latency and allocations of both ends together.
//
// TestUnary has plain grpc-go beside it, TestHTTP plain net/http; both get the deadline by a context
// that the SDK gets by its policy, since a deadline has its price with or without a mesh. TestRoutes
// has a service of one route beside one of 1000.
//
// It has tests only: `make bench` runs them long enough to quote. Only allocations are asserted on.
package bench
