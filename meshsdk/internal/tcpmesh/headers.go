package tcpmesh

// IdentityHeaders are the headers, in lower case, by which proxies tell a server who the client
// is. A server of the mesh knows that from the connection, so both skins take them off what comes
// in: a handler that believes one of them would believe anybody.
//
// x-forwarded-client-cert is Envoy's; client-cert and client-cert-chain are RFC 9440's, which asks
// of whoever ends TLS to remove those that a client sent.
var IdentityHeaders = []string{
	"x-forwarded-client-cert",
	"client-cert",
	"client-cert-chain",
	"x-spiffe-id",
}

// HTTPIdentityHeaders are IdentityHeaders and those that only ingress controllers in front of HTTP
// servers use. gRPC looks for the short list: each name costs every call a look at all metadata.
var HTTPIdentityHeaders = append(IdentityHeaders[:len(IdentityHeaders):len(IdentityHeaders)],
	"ssl-client-cert",
	"ssl-client-verify",
	"ssl-client-subject-dn",
)
