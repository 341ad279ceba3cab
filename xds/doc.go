// Package xds is a client of an xDS control plane: one ADS stream, resources watched by type and
// name or a whole type at once, the last known good kept on disk. meshsdk makes one Client a Mesh
// and reads it through xds/graph; the node agent watches its own types with it. It decides nothing
// about calls, holds no credentials (Config.Dial does) and logs no resource.
package xds
