// Package examples holds programs to copy from: grpc, http and standalone. Each stands by itself;
// the tests here build the binary of the mesh and run them in it.
package examples
