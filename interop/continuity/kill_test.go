package continuity

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/inlay-mesh/inlay/ebpf/bpfobj"
)

// kills is how often the agent is killed.
const kills = 20

// The agent dies twenty times, at any moment of its life, its start included: no denied connection
// passes, no allowed one fails, the long one lives, names resolve, and no record is lost uncounted.
func TestKilledAgent(t *testing.T) {
	w := newWorld(t)
	began := time.Now()
	w.startProbes(100)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var starts []time.Duration
	for i := range kills {
		if i%2 == 0 {
			starts = append(starts, w.node.ready())
			<-time.After(time.Duration(random.IntN(200)) * time.Millisecond) // any moment of its life
		} else {
			select { // any moment of its start
			case <-w.node.up:
			case <-time.After(time.Duration(random.IntN(1000)) * time.Millisecond):
			}
		}
		w.node.kill()
		<-time.After(time.Duration(random.IntN(100)) * time.Millisecond) // how long who watches it takes to see
		w.startNode(versionA)
	}
	starts = append(starts, w.node.ready())
	w.progress(50)
	t.Logf("killed %d times; starts took %v", kills, starts)
	v := w.conclude(began)

	// The kernel counted each refusal, and told the programs of each. A refused SYN whose port is that of an
	// allowed connection in TIME-WAIT at the server is sent twice: the first is answered by an ACK of
	// what was there (RFC 1122, 4.2.2.13), and sk_lookup tells of both.
	a := w.settled()
	after := w.counters()
	ingress, egress := int64(after[uint32(bpfobj.InlayCounterCOUNT_DENIED_INGRESS)]), int64(after[uint32(bpfobj.InlayCounterCOUNT_DENIED_EGRESS)])
	again := int64(after[uint32(bpfobj.InlayCounterCOUNT_RETRANSMITS)])
	if tries := v.stranger.Probes["ingress"].Tries; ingress < tries || ingress > tries+again {
		t.Errorf("refusals at ingress: the kernel counted %d, the stranger saw %d; %d segments were sent again", ingress, tries, again)
	}
	if tries := v.stranger.Probes["egress"].Tries; egress != tries {
		t.Errorf("refusals at egress: the kernel counted %d, the stranger saw %d", egress, tries)
	}
	// Both ends of each allowed connection are told at its close, and each refusal.
	least := uint64(2*v.client.Probes["allowed"].OK) + uint64(ingress+egress)
	t.Logf("records over %d lives: made %d = kept %d + lost %d; at least %d were due", w.starts, a.Made, a.Kept, a.Lost, least)
	if a.Made < least {
		t.Errorf("records: made %d: want at least %d", a.Made, least)
	}
	if a.Lost != 0 {
		t.Errorf("records: lost %d: want 0, there was room", a.Lost)
	}
}
