package object

// Code identifies a kind of finding. Codes are stable: one is never given a second meaning.
// INL1 are faults of one object, INL12 faults between objects, INL2 warnings.
type Code string

// Codes of findings.
const (
	YAMLSyntax    Code = "INL1001"
	DuplicateKey  Code = "INL1002"
	YAMLFeature   Code = "INL1003"
	UnknownKind   Code = "INL1004"
	UnknownField  Code = "INL1005"
	WrongType     Code = "INL1006"
	MissingField  Code = "INL1007"
	BadName       Code = "INL1008"
	BadEnum       Code = "INL1009"
	OutOfRange    Code = "INL1010"
	BadFormat     Code = "INL1011"
	Repeated      Code = "INL1012"
	Contradiction Code = "INL1013"
	NotBuilt      Code = "INL1014"

	SelectsNothing Code = "INL1015"
	NoNetworkRules Code = "INL1016"

	DuplicateObject Code = "INL1201"
	UnknownParent   Code = "INL1202"
	UnknownTarget   Code = "INL1203"
	UnknownVersion  Code = "INL1204"
	UnknownPort     Code = "INL1205"
	AmbiguousPort   Code = "INL1206"
	TwoPolicies     Code = "INL1207"
	WrongProtocol   Code = "INL1208"
	MixedRoutes     Code = "INL1209"
	UnknownService  Code = "INL1210"

	UnknownBackend     Code = "INL2001"
	Unreachable        Code = "INL2002"
	FirstPort          Code = "INL2003"
	NoBackends         Code = "INL2004"
	Shadowed           Code = "INL2005"
	HeaderIgnored      Code = "INL2006"
	NoEffect           Code = "INL2007"
	ParentGroup        Code = "INL2008"
	RegisteredPort     Code = "INL2009"
	RegisteredProtocol Code = "INL2010"
	SplitPolicy        Code = "INL2011"
	NoRules            Code = "INL2012"
	UnknownPeer        Code = "INL2013"
	NoVirtualAddress   Code = "INL2014"
)

// Severity returns Warning for the codes INL2..., else Fault.
func (c Code) Severity() Severity {
	if len(c) > 3 && c[3] == '2' {
		return Warning
	}
	return Fault
}

// CodeInfo explains a code.
type CodeInfo struct {
	Code Code
	Name string // short, with hyphens
	Text string // one sentence
}

// Codes is the table of all codes, ascending. docs/config.md repeats it.
var Codes = []CodeInfo{
	{YAMLSyntax, "yaml-syntax", "The text is not YAML; nothing of that document was read."},
	{DuplicateKey, "duplicate-key", "A mapping holds a key twice."},
	{YAMLFeature, "yaml-feature", "YAML that no configuration needs: a key that is not text, a tag, an anchor that contains itself, a document too large or too deep."},
	{UnknownKind, "unknown-kind", "No kind of that name and apiVersion is known."},
	{UnknownField, "unknown-field", "The kind has no such field."},
	{WrongType, "wrong-type", "A value of another type is wanted, for example text instead of a number."},
	{MissingField, "missing-field", "A required field is not there."},
	{BadName, "bad-name", "A name is not one that names of the mesh may have."},
	{BadEnum, "bad-enum", "The value is not one of those accepted."},
	{OutOfRange, "out-of-range", "A number, a count or a length is outside its range."},
	{BadFormat, "bad-format", "Text is not in the form wanted: a duration, an address, a path, a header."},
	{Repeated, "repeated", "A list holds an entry twice that must be there once."},
	{Contradiction, "contradiction", "Two fields of one object contradict each other."},
	{NotBuilt, "not-built", "A field or value of the standard that this release does not honour; it is refused, never ignored."},
	{SelectsNothing, "selects-nothing", "A selector, a peer or a list of a NetworkPolicy names nothing; elsewhere that would mean everything."},
	{NoNetworkRules, "no-network-rules", "A NetworkPolicy, or a direction of it, has no rules and so no effect."},
	{DuplicateObject, "duplicate-object", "Two objects have the same kind, namespace and name."},
	{UnknownParent, "unknown-parent", "A route's parentRef names a service that no MeshService declares."},
	{UnknownTarget, "unknown-target", "A policy's targetRef names a service that no MeshService declares."},
	{UnknownVersion, "unknown-version", "A reference names a version that its MeshService does not list."},
	{UnknownPort, "unknown-port", "A reference names a port that its MeshService does not list."},
	{AmbiguousPort, "ambiguous-port", "A reference without a port, to a service with several."},
	{TwoPolicies, "two-policies", "Two policies are for the same target."},
	{WrongProtocol, "wrong-protocol", "A route is attached to a port, or sends calls to one, that does not speak its protocol."},
	{MixedRoutes, "mixed-routes", "HTTPRoutes and GRPCRoutes are attached to the same port; the standard lets only one kind take effect."},
	{UnknownService, "unknown-service", "A NetworkPolicy names a service that no MeshService declares."},
	{UnknownBackend, "unknown-backend", "Neither configuration nor registry knows the backend; it keeps its weight, and its share of the calls fails."},
	{Unreachable, "unreachable", "A static endpoint of a strict service does not speak mesh TLS; nobody calls it."},
	{FirstPort, "first-port", "The service has several ports: its name without a port means the first one."},
	{NoBackends, "no-backends", "A rule has no backend with a weight; every call it matches fails."},
	{Shadowed, "shadowed", "A match can never be reached, since an earlier one takes all its calls."},
	{HeaderIgnored, "header-ignored", "A header is matched twice in one match; the standard lets the first one count."},
	{NoEffect, "no-effect", "A field that has no meaning here."},
	{ParentGroup, "parent-group", "A parentRef to a Service without group: the standard wants it written as an empty text."},
	{RegisteredPort, "registered-port", "An instance registered a port that its MeshService does not list; the port is not used."},
	{RegisteredProtocol, "registered-protocol", "Instances disagree with the MeshService, or with each other, about the protocol of a port."},
	{SplitPolicy, "split-policy", "Timeouts or retries of a version's policy cannot be used by a rule that splits over several backends."},
	{NoRules, "no-rules", "A GRPCRoute without rules matches no call, so every call to its parents fails."},
	{UnknownPeer, "unknown-peer", "A peer of a NetworkPolicy is of a namespace in which no service is declared; it may be nobody."},
	{NoVirtualAddress, "no-virtual-address", "The range of virtual addresses is used up; a service has none."},
}
