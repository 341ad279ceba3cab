package serve

import (
	"testing"

	"github.com/inlay-mesh/inlay/controlplane/xdsgen"
)

// A name that one request both subscribes to and unsubscribes from leaves nothing behind: else a
// client could fill the memory with names that no bound counts.
func TestANameInBothListsIsNotIndexed(t *testing.T) {
	s := New(Config{})
	st := &stream{server: s, keys: map[xdsgen.Key]struct{}{}}
	k := xdsgen.Key{Kind: xdsgen.SDK, Type: xdsgen.EndpointsType, Name: "orders.default:80"}
	s.follow(st, []xdsgen.Key{k}, []xdsgen.Key{k})
	if len(s.index) != 0 || len(st.keys) != 0 {
		t.Errorf("index of %d names, stream of %d; want none", len(s.index), len(st.keys))
	}
}
