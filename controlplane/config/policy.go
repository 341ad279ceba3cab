package config

import (
	"slices"
	"strconv"
	"strings"

	"github.com/inlay-mesh/inlay/controlplane/config/check"
	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
)

// retryWords are the conditions of retries.on that are not status codes.
var retryWords = []string{"unavailable", "connect-failure", "refused-stream", "reset", "cancelled", "deadline-exceeded", "internal", "resource-exhausted"}

// trafficPolicy is a TrafficPolicy as written. docs/config.md explains each field.
type trafficPolicy struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Metadata   check.Metadata    `json:"metadata"`
	Spec       trafficPolicySpec `json:"spec"`
}

type trafficPolicySpec struct {
	TargetRef     targetRef      `json:"targetRef"`
	Timeouts      policyTimeouts `json:"timeouts"`
	Retries       *policyRetries `json:"retries"`
	LoadBalancing struct {
		Policy *string `json:"policy"`
	} `json:"loadBalancing"`
	Limits struct {
		MaxRequests *int64 `json:"maxRequests"`
	} `json:"limits"`
}

type targetRef struct {
	Group *string `json:"group"`
	Kind  string  `json:"kind"`
	Name  string  `json:"name"`
}

// policyTimeouts: idle ends a call on which nothing moved in either direction for that long, as
// Envoy's RouteAction.idle_timeout does for a stream.
type policyTimeouts struct {
	Request *string `json:"request"`
	PerTry  *string `json:"perTry"`
	Idle    *string `json:"idle"`
}

type policyRetries struct {
	Attempts *int64   `json:"attempts"`
	On       []string `json:"on"`
	Backoff  struct {
		Base *string `json:"base"`
		Max  *string `json:"max"`
	} `json:"backoff"`
	BudgetPercent *float64 `json:"budgetPercent"`
	MinPerSecond  *int64   `json:"minPerSecond"`
}

func parsePolicy(t *tree.Tree) (object.Policy, []object.Finding) {
	o := check.New(t, "TrafficPolicy")
	var in trafficPolicy
	o.Decode(&in)
	p := object.Policy{Meta: o.Meta("TrafficPolicy", in.Metadata, false)}
	p.Target = policyTarget(o, in.Spec.TargetRef)

	timeouts := func(field string) []any { return []any{"spec", "timeouts", field} }
	p.Request = o.Duration(in.Spec.Timeouts.Request, timeouts("request")...)
	p.PerTry = o.Duration(in.Spec.Timeouts.PerTry, timeouts("perTry")...)
	p.Idle = o.Duration(in.Spec.Timeouts.Idle, timeouts("idle")...)
	if p.Request != nil && p.PerTry != nil && *p.Request > 0 && *p.PerTry > *p.Request {
		o.Add(object.Contradiction, timeouts("perTry"), " %s is longer than request %s: want at most that", p.PerTry, p.Request)
	}
	if in.Spec.Retries != nil {
		p.Retries = retries(o, in.Spec.Retries)
	}
	if lb := in.Spec.LoadBalancing.Policy; lb != nil && o.Enum(*lb, []string{"LeastRequest", "RoundRobin"}, "spec", "loadBalancing", "policy") {
		v := object.LB(*lb)
		p.LB = &v
	}
	if n := in.Spec.Limits.MaxRequests; n != nil && o.Range(*n, 1, 1_000_000, "spec", "limits", "maxRequests") {
		p.MaxRequests = ptr(uint32(*n))
	}
	return p, o.Findings
}

func policyTarget(o *check.Object, in targetRef) object.Target {
	at := func(field string) []any { return []any{"spec", "targetRef", field} }
	if !o.Required("what the policy is for, such as {kind: Service, name: orders}", "spec", "targetRef") || !o.Tree.Sound("spec", "targetRef") {
		return object.Target{}
	}
	out := object.Target{Pos: o.Tree.At("spec", "targetRef")}
	kind := o.Required("Service or ServiceVersion", at("kind")...) && o.Enum(in.Kind, []string{"Service", "ServiceVersion"}, at("kind")...)
	named := o.Required("the name of the service, or SERVICE.VERSION", at("name")...)
	if !kind || !o.Tree.Sound(at("kind")...) {
		return out
	}
	if in.Kind == "Service" {
		if in.Group != nil && *in.Group != "" && *in.Group != "core" {
			o.Add(object.BadEnum, at("group"), ` %s: a Service is of group "" (or core)`, check.Quote(*in.Group))
		}
		if named && o.ServiceName(in.Name, at("name")...) {
			out.Service = in.Name
		}
		return out
	}
	if in.Group != nil && *in.Group != "inlay.dev" {
		o.Add(object.BadEnum, at("group"), ` %s: a ServiceVersion is of group inlay.dev`, check.Quote(*in.Group))
	}
	if named {
		out.Service, out.Version = o.VersionName(in.Name, at("name")...)
	}
	return out
}

func retries(o *check.Object, in *policyRetries) *object.Retries {
	at := func(field ...any) []any { return append([]any{"spec", "retries"}, field...) }
	if !o.Tree.Sound(at()...) {
		return nil
	}
	out := &object.Retries{Pos: o.Tree.At(at()...)}
	if in.Attempts != nil && o.Range(*in.Attempts, 1, 10, at("attempts")...) {
		out.Attempts = ptr(uint32(*in.Attempts))
	}
	if o.Tree.Has(at("on")...) {
		o.Count(len(in.On), 1, 32, at("on")...)
		out.On, out.Codes = retryOn(o, in.On, at("on"))
	}
	out.Base = o.Duration(in.Backoff.Base, at("backoff", "base")...)
	out.Max = o.Duration(in.Backoff.Max, at("backoff", "max")...)
	if out.Base != nil && *out.Base == 0 {
		o.Add(object.OutOfRange, at("backoff", "base"), " 0s: want 1ms to 8760h")
	}
	if out.Max != nil && *out.Max == 0 {
		o.Add(object.OutOfRange, at("backoff", "max"), " 0s: want 1ms to 8760h")
	}
	if out.Base != nil && out.Max != nil && *out.Max < *out.Base {
		o.Add(object.Contradiction, at("backoff", "max"), " %s is shorter than base %s: want at least that", out.Max, out.Base)
	}
	if p := in.BudgetPercent; p != nil && o.Tree.Sound(at("budgetPercent")...) {
		if *p < 0.1 || *p > 100 {
			o.Add(object.OutOfRange, at("budgetPercent"), " %s: want 0.1 to 100", strconv.FormatFloat(*p, 'g', -1, 64))
		} else {
			out.BudgetPercent = p
		}
	}
	if in.MinPerSecond != nil && o.Range(*in.MinPerSecond, 0, 10_000, at("minPerSecond")...) {
		out.MinPerSecond = ptr(uint32(*in.MinPerSecond))
	}
	return out
}

func retryOn(o *check.Object, in []string, path []any) (words []string, codes []uint32) {
	words = []string{}
	first := map[string]int{}
	for i, w := range in {
		at := append(slices.Clone(path), i)
		if !o.Tree.Sound(at...) {
			continue
		}
		if j, ok := first[w]; ok {
			o.Add(object.Repeated, at, " %s: already on[%d]: want each once", check.Quote(w), j)
			continue
		}
		first[w] = i
		if n, err := strconv.Atoi(w); err == nil && w[0] != '+' && w[0] != '-' && w[0] != '0' {
			if n < 400 || n > 599 {
				o.Add(object.OutOfRange, at, " %s: want a status code from 400 to 599", check.Quote(w))
			} else {
				codes = append(codes, uint32(n))
			}
			continue
		}
		if slices.Contains(retryWords, w) {
			words = append(words, w)
			continue
		}
		msg := ""
		if near := tree.Nearest(w, retryWords); near != "" {
			msg = "; did you mean " + near + "?"
		}
		o.Add(object.BadEnum, at, " %s: want %s, or an HTTP status code in quotes, such as \"503\"%s", check.Quote(w), strings.Join(retryWords, ", "), msg)
	}
	slices.Sort(codes)
	return words, codes
}

func ptr[T any](v T) *T { return &v }
