package meshsdk

import (
	"github.com/inlay-mesh/inlay/meshsdk/internal/report"
	"github.com/inlay-mesh/inlay/xds/meshpb/reportpb"
)

// DecisionProto is d as it goes over the wire to the control plane and, as JSON, to readers of the
// CLI: the field names are those of inlay.report.v1.Decision. Nil gives nil.
func DecisionProto(d *Decision) *reportpb.Decision {
	if d == nil {
		return nil
	}
	return report.ToProto(d)
}
