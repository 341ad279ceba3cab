// Package foreign tests the SDK with what others wrote: an ADS server of go-control-plane in place
// of ours, and other programs' protobufs in the same binary.
//
// It has tests only.
package foreign
