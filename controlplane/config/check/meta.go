package check

import (
	"strings"

	"github.com/inlay-mesh/inlay/controlplane/config/object"
	"github.com/inlay-mesh/inlay/controlplane/config/tree"
)

// DefaultNamespace is where an object without a namespace is.
const DefaultNamespace = "default"

// Metadata is the metadata that every kind accepts. Labels and annotations are the author's own;
// what a Kubernetes API server adds has no effect here and is warned of.
type Metadata struct {
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace"`
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`

	CreationTimestamp          any `json:"creationTimestamp"`
	DeletionGracePeriodSeconds any `json:"deletionGracePeriodSeconds"`
	DeletionTimestamp          any `json:"deletionTimestamp"`
	Finalizers                 any `json:"finalizers"`
	GenerateName               any `json:"generateName"`
	Generation                 any `json:"generation"`
	ManagedFields              any `json:"managedFields"`
	OwnerReferences            any `json:"ownerReferences"`
	ResourceVersion            any `json:"resourceVersion"`
	SelfLink                   any `json:"selfLink"`
	UID                        any `json:"uid"`
}

var used = map[string]bool{"name": true, "namespace": true, "labels": true, "annotations": true}

// New begins to check the object of a document of this kind. The label names the object as far as
// its name can be read before it is decoded.
func New(t *tree.Tree, kind string) *Object {
	label := kind
	if name, ok := t.Get("metadata", "name").Text(); ok {
		if ns, ok := t.Get("metadata", "namespace").Text(); ok && ns != DefaultNamespace {
			name = ns + "/" + name
		}
		label += " " + Quote(name)
	}
	return &Object{Tree: t, Label: label}
}

// Decode fills into and reports unknown fields and wrong types.
func (o *Object) Decode(into any) {
	o.Findings = append(o.Findings, o.Tree.Decode(o.Label, into)...)
}

// Meta judges the metadata and returns it with the default namespace filled in. Names are names of
// services where service is true, else RFC 1123 subdomains, as Kubernetes has them.
func (o *Object) Meta(kind string, m Metadata, service bool) object.Meta {
	if o.Required("the object's name", "metadata", "name") {
		if service {
			o.ServiceName(m.Name, "metadata", "name")
		} else {
			o.Subdomain(m.Name, "metadata", "name")
		}
	}
	ns := m.Namespace
	if !o.Tree.Has("metadata", "namespace") {
		ns = DefaultNamespace
	} else {
		o.Namespace(ns, "metadata", "namespace")
	}
	if md := o.Tree.Get("metadata"); md != nil {
		var extra []string
		for _, k := range md.Keys() {
			if !used[k] && md.Has(k) && knownMeta(k) {
				extra = append(extra, k)
			}
		}
		if len(extra) > 0 {
			o.AddKey(object.NoEffect, []any{"metadata", extra[0]}, "metadata that a Kubernetes API server adds has no effect here: remove %s", strings.Join(extra, ", "))
		}
	}
	return object.Meta{Kind: kind, Namespace: ns, Name: m.Name, Pos: o.Tree.Pos}
}

func knownMeta(key string) bool {
	switch key {
	case "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp", "finalizers", "generateName", "generation",
		"managedFields", "ownerReferences", "resourceVersion", "selfLink", "uid":
		return true
	}
	return false
}
