package workload

import (
	"errors"
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
	return service{namespace: namespace, name: name}, identity.CheckService(namespace, name)
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
