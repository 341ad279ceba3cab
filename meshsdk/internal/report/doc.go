// Package report keeps one stream to the control plane on which an SDK tells its status and
// counters, answers what a call would do, and hears which namespaces the mesh has.
//
// meshsdk runs one Reporter for each Mesh. It is off the path of calls: nothing waits for it, what
// it holds is bounded, and everything on the stream may be lost without harm. It never sends a
// payload, a header or a key.
package report
