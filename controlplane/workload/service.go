package workload

import (
	"errors"
	"fmt"
	"strings"

	"github.com/inlay-mesh/inlay/identity"
)

// service names one service of the mesh.
type service struct{ namespace, name string }

func (s service) String() string { return s.name + "." + s.namespace }

// newService checks the names; an empty namespace means default.
func newService(namespace, name string) (service, error) {
	if namespace == "" {
		namespace = "default"
	}
	s := service{namespace: namespace, name: name}
	var errs []error
	if err := identity.CheckName(namespace); err != nil {
		errs = append(errs, fmt.Errorf("namespace %q: %w", namespace, err))
	}
	if namespace == identity.ReservedNamespace {
		errs = append(errs, fmt.Errorf("namespace %q is the mesh's own: want another one", namespace))
	}
	if err := identity.CheckName(name); err != nil {
		errs = append(errs, fmt.Errorf("service %q: %w", name, err))
	}
	return s, errors.Join(errs...)
}

// parseService reads NAME or NAMESPACE/NAME.
func parseService(s string) (service, error) {
	if namespace, name, ok := strings.Cut(s, "/"); ok {
		if namespace == "" {
			return service{}, errors.New("namespace is empty")
		}
		return newService(namespace, name)
	}
	return newService("", s)
}

func compareText(a, b error) int { return strings.Compare(a.Error(), b.Error()) }
