module github.com/inlay-mesh/inlay/meshsdk/meshtest

go 1.26.0

require (
	github.com/inlay-mesh/inlay v0.0.0
	github.com/inlay-mesh/inlay/controlplane v0.0.0
)

replace (
	github.com/inlay-mesh/inlay => ../../
	github.com/inlay-mesh/inlay/controlplane => ../../controlplane
)
