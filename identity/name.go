package identity

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ReservedNamespace holds the parts of the mesh itself. No workload is ever attested into it.
const ReservedNamespace = "inlay"

// ServiceID is the SPIFFE ID of a service: spiffe://TRUST_DOMAIN/ns/NAMESPACE/svc/SERVICE.
// Both names must be DNS labels (CheckName).
func ServiceID(td spiffeid.TrustDomain, namespace, service string) (spiffeid.ID, error) {
	if td.IsZero() {
		return spiffeid.ID{}, errors.New("trust domain is empty: want a name such as inlay.local")
	}
	err := errors.Join(checkAs("namespace", namespace), checkAs("service", service))
	if err != nil {
		return spiffeid.ID{}, err
	}
	return spiffeid.FromSegments(td, "ns", namespace, "svc", service)
}

// ControlPlaneID is the SPIFFE ID that the control plane of a trust domain shows.
func ControlPlaneID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "ns", ReservedNamespace, "svc", "controlplane")
}

// ParseServiceID is the reverse of ServiceID; ok is false for an ID of any other form.
func ParseServiceID(id spiffeid.ID) (namespace, service string, ok bool) {
	p := strings.Split(id.Path(), "/")
	if len(p) != 5 || p[1] != "ns" || p[3] != "svc" || CheckName(p[2]) != nil || CheckName(p[4]) != nil {
		return "", "", false
	}
	return p[2], p[4], true
}

// CheckName says whether s may be the name of a namespace or service: a DNS label of RFC 1123, in
// lower case, so that a name is one segment of a SPIFFE ID and one label of a host.
func CheckName(s string) error {
	if s == "" {
		return errors.New("empty: want a DNS label such as orders")
	}
	if len(s) > 63 {
		return fmt.Errorf("%d characters: want at most 63", len(s))
	}
	for i := range len(s) {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (c != '-' || i == 0 || i == len(s)-1) {
			return fmt.Errorf("%q at character %d: want lower-case letters, digits and inner dashes", c, i+1)
		}
	}
	return nil
}

// CheckService says whether a workload may be this service: two DNS labels, and neither a part of
// the mesh itself nor a name that means something else to callers.
func CheckService(namespace, service string) error {
	errs := []error{checkAs("namespace", namespace), checkAs("service", service)}
	switch namespace {
	case ReservedNamespace:
		errs = append(errs, fmt.Errorf("namespace %q is the mesh's own: want another one", namespace))
	case "mesh", "localhost":
		errs = append(errs, fmt.Errorf("namespace %q: NAME.%s is no name of a service to callers: want another one", namespace, namespace))
	}
	if service == "localhost" {
		errs = append(errs, fmt.Errorf("service %q: it names the machine itself and never a service: want another name", service))
	}
	return errors.Join(errs...)
}

func checkAs(what, name string) error {
	if err := CheckName(name); err != nil {
		return fmt.Errorf("%s %.80q: %w", what, name, err) // it may come from the wire
	}
	return nil
}
