package config

import (
	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
)

// teach says of the fields of other systems' policies how the same is written here, in place of
// the bare word that they are unknown.
func teach(o *check.Object) {
	hints := map[object.Pos]string{}
	spec := o.Tree.Get("spec")
	collect(spec, specHints, hints)
	collect(o.Tree.Get("spec", "workloads"), subjectHints, hints)
	for _, name := range []string{"ingress", "egress"} {
		own, peers := ingressHints, "from"
		if name == "egress" {
			own, peers = egressHints, "to"
		}
		for i := 0; spec.Get(name, i) != nil; i++ {
			rule := spec.Get(name, i)
			collect(rule, ruleHints, hints)
			collect(rule, own, hints)
			for j := 0; rule.Get(peers, j) != nil; j++ {
				collect(rule.Get(peers, j), peerHints, hints)
			}
			for j := 0; rule.Get("ports", j) != nil; j++ {
				collect(rule.Get("ports", j), portHints, hints)
			}
		}
	}
	for i := range o.Findings {
		f := &o.Findings[i]
		if hint := hints[object.Pos{File: f.File, Line: f.Line, Col: f.Col}]; hint != "" && f.Code == string(object.UnknownField) {
			f.Message = o.Label + ": " + hint
		}
	}
}

// collect notes the hints for the keys of a mapping by their place.
func collect(t *tree.Tree, hints map[string]string, into map[object.Pos]string) {
	if t == nil || t.Kind != tree.Map {
		return
	}
	for _, k := range t.Keys() {
		if hint := hints[k]; hint != "" {
			n := t.Get(k)
			into[n.KeyPos] = n.Path + ": unknown field: " + hint
		}
	}
}

const notBuilt = "waits for a later release"

var (
	specHints = map[string]string{
		"podSelector":       "write workloads: {service: NAME} or workloads: {labels: {...}}; there are no pods here",
		"endpointSelector":  "write workloads: {service: NAME} or workloads: {labels: {...}}",
		"nodeSelector":      "policies are for workloads: write workloads: {service: NAME}",
		"selector":          "write workloads: {service: NAME} or workloads: {labels: {...}}",
		"subjects":          "write workloads: {service: NAME} or workloads: {labels: {...}}",
		"policyTypes":       "not needed: a direction that an allow rule selects is denied by default; to deny all of one write [{action: deny}] as its rules",
		"types":             "not needed: a direction that an allow rule selects is denied by default",
		"enableDefaultDeny": "not needed: a direction that an allow rule selects is denied by default, one that only deny rules select is not",
		"ingressDeny":       "write the rules under ingress with action: deny",
		"egressDeny":        "write the rules under egress with action: deny",
		"order":             "there is no order: deny rules come first",
		"rules":             "write them under ingress or egress",
	}
	subjectHints = map[string]string{
		"namespace":        "a policy selects workloads of its own namespace: set metadata.namespace",
		"matchLabels":      "write the labels right under labels",
		"matchExpressions": "expressions wait for a later release: write labels that must be equal",
	}
	ingressHints = map[string]string{"to": "an ingress rule has from: write to in an egress rule"}
	egressHints  = map[string]string{"from": "an egress rule has to: write from in an ingress rule"}
	ruleHints    = map[string]string{
		"toPorts":        "write ports: [{port: 8080, protocol: TCP}]; rules of HTTP or DNS wait for a later release",
		"fromEndpoints":  "write from: [{labels: {...}}] or [{service: NAME}]",
		"toEndpoints":    "write to: [{labels: {...}}] or [{service: NAME}]",
		"fromEntities":   "write from: [{entity: world}]",
		"toEntities":     "write to: [{entity: world}]",
		"fromCIDR":       "write from: [{cidr: 10.0.0.0/8}]",
		"toCIDR":         "write to: [{cidr: 10.0.0.0/8}]",
		"fromCIDRSet":    "write from: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]",
		"toCIDRSet":      "write to: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]",
		"toServices":     "write to: [{service: NAME}]",
		"toFQDNs":        "names of the outside (FQDN policy) wait for a later release: write to: [{cidr: ...}]",
		"icmps":          "write ports: [{protocol: ICMP}]",
		"authentication": notBuilt,
		"source":         "write from: [...]",
		"destination":    "write to: [...]",
		"protocol":       "write it in ports: [{protocol: UDP}]",
	}
	peerHints = map[string]string{
		"podSelector":       "write {labels: {...}} or {service: NAME}",
		"namespaceSelector": "write {namespace: NAME}; namespaces have no labels here",
		"ipBlock":           "write {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}",
		"matchLabels":       "write the labels right under labels",
		"matchName":         "names of the outside (FQDN policy) wait for a later release",
		"matchPattern":      "names of the outside (FQDN policy) wait for a later release",
		"fqdn":              "names of the outside (FQDN policy) wait for a later release: write {cidr: ...}",
		"serviceAccount":    "write {service: NAME, namespace: NAMESPACE}: services are the identities of the mesh",
		"principals":        "write {service: NAME, namespace: NAMESPACE}: services are the identities of the mesh",
		"port":              "ports stand beside the peers: write ports: [{port: 8080}] in the rule",
		"ports":             "ports stand beside the peers: write ports in the rule",
	}
	portHints = map[string]string{
		"ports": "write each as an entry of its own: [{port: 80, protocol: TCP}]",
		"rules": "rules of HTTP or DNS wait for a later release",
		"name":  "named ports are not known: write the number",
	}
)
