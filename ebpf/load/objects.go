package load

import (
	"github.com/cilium/ebpf"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// objects are the compiled programs, by stem: one file of ebpf/bpf each.
var objects = map[string]func() (*ebpf.CollectionSpec, error){
	"bind":        bpfobj.LoadBind,
	"connect":     bpfobj.LoadConnect,
	"getpeername": bpfobj.LoadGetpeername,
	"iter":        bpfobj.LoadIter,
	"iterdrop":    bpfobj.LoadIterdrop,
	"recvmsg":     bpfobj.LoadRecvmsg,
	"sendmsg":     bpfobj.LoadSendmsg,
	"skb":         bpfobj.LoadSkb,
	"sklookup":    bpfobj.LoadSklookup,
	"sock":        bpfobj.LoadSock,
	"sockops":     bpfobj.LoadSockops,
	"trace":       bpfobj.LoadTrace,
}
