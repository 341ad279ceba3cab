package compile

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/ir"
)

// workloads groups the instances and static endpoints of a service by their labels: what policies
// can tell apart. Instances without ports are among them, draining ones too.
func (b *builder) workloads(n name, declared *object.Service) []ir.Workload {
	var out []ir.Workload
	var index map[string]int // by label key; made for the second set of labels, which few services have
	last := -1
	group := func(labels map[string]string) int {
		if last >= 0 && maps.Equal(out[last].Labels, labels) {
			return last
		}
		if index == nil && last >= 0 {
			index = map[string]int{ir.LabelKey(out[last].Labels): last}
		}
		if i, ok := index[ir.LabelKey(labels)]; ok {
			return i
		}
		w := ir.Workload{}
		if len(labels) > 0 {
			w.Labels = labels
		}
		out = append(out, w)
		if index != nil {
			index[ir.LabelKey(labels)] = len(out) - 1
		}
		return len(out) - 1
	}
	add := func(labels map[string]string, addresses ...netip.Addr) {
		last = group(labels)
		for _, a := range addresses {
			// Every machine has its own loopback: such an address says nothing about who calls.
			if !a.IsLoopback() {
				out[last].Addresses = append(out[last].Addresses, a)
			}
		}
	}
	for i := range b.instances[n] {
		in := &b.instances[n][i]
		if len(in.Addresses) > 0 {
			add(in.Labels, in.Addresses...)
			continue
		}
		// It does not say where its connections come from: where it listens is the best guess.
		add(in.Labels)
		for _, p := range in.Ports {
			for _, a := range p.Addresses {
				add(in.Labels, a.Addr())
			}
		}
	}
	if declared != nil {
		// As of endpoints: where an instance and a static endpoint have one address, the instance counts.
		registered := len(out)
		for i := range declared.Endpoints {
			e := &declared.Endpoints[i]
			if slices.ContainsFunc(out[:registered], func(w ir.Workload) bool { return slices.Contains(w.Addresses, e.Address) }) {
				add(e.Labels)
			} else {
				add(e.Labels, e.Address)
			}
		}
	}
	if len(out) > 1 {
		slices.SortFunc(out, func(x, y ir.Workload) int { return cmp.Compare(ir.LabelKey(x.Labels), ir.LabelKey(y.Labels)) })
	}
	for i := range out {
		slices.SortFunc(out[i].Addresses, netip.Addr.Compare)
		out[i].Addresses = slices.Compact(out[i].Addresses)
	}
	return out
}
