// Package bench measures the SDK beside plain grpc-go with mutual TLS, in one process and one run:
// callers in a closed loop over loopback TCP, 100 bytes each way, the two in rotated rounds, so
// that a machine whose speed drifts does not favour one of them. Figures are ratios.
//
// It has tests only: `make bench` runs them long enough to quote.
package bench
