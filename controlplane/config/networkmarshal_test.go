package config

import "github.com/inlay-mesh/inlay/controlplane/config/object"

// networkSpec writes a policy as parseNetworkPolicy reads it.
func networkSpec(p *object.NetworkPolicy) fields {
	out := fields{"workloads": selectorFields(&p.Subject)}
	if p.Audit {
		out["mode"] = "audit"
	}
	for _, d := range []struct {
		name, peers string
		rules       []object.NetworkRule
	}{{"ingress", "from", p.Ingress}, {"egress", "to", p.Egress}} {
		var rules []any
		for i := range d.rules {
			rules = append(rules, networkRule(&d.rules[i], d.peers))
		}
		if rules != nil {
			out[d.name] = rules
		}
	}
	return out
}

func selectorFields(s *object.Selector) fields {
	out := fields{}
	set(out, "service", s.Service)
	if len(s.Labels) > 0 {
		out["labels"] = s.Labels
	}
	if s.NamespaceWritten {
		out["namespace"] = s.Namespace
	}
	return out
}

func networkRule(r *object.NetworkRule, peersField string) fields {
	out := fields{}
	set(out, "name", r.Name)
	set(out, "errno", r.Errno)
	if r.Deny {
		out["action"] = "deny"
	}
	var peers, ports []any
	for i := range r.Peers {
		switch p := &r.Peers[i]; {
		case p.Workloads != nil:
			peers = append(peers, selectorFields(p.Workloads))
		case p.Entity != "":
			peers = append(peers, fields{"entity": string(p.Entity)})
		default:
			f := fields{"cidr": p.CIDR.String()}
			var except []string
			for _, e := range p.Except {
				except = append(except, e.String())
			}
			if except != nil {
				f["except"] = except
			}
			peers = append(peers, f)
		}
	}
	for _, p := range r.Ports {
		f := fields{"protocol": string(p.Protocol)}
		set(f, "port", p.First)
		if p.Last != p.First {
			f["endPort"] = p.Last
		}
		ports = append(ports, f)
	}
	if peers != nil {
		out[peersField] = peers
	}
	if ports != nil {
		out["ports"] = ports
	}
	return out
}
