package continuity

import (
	"math/rand/v2"
	"strings"
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

// The policy changes while the agent is dead. Until it is back the old one holds; from then on the new one,
// also for the connection that was open all the time.
func TestPolicyChangedWhileTheAgentIsDead(t *testing.T) {
	w := newWorld(t)
	w.startProbes(50)
	w.node.kill()
	exchanged := strings.Replace(worldFile, "from: [{labels: {role: client}}]", "from: [{labels: {role: stranger}}]", 1)
	if exchanged == worldFile {
		t.Fatal("the world has no rule to change")
	}
	w.write("world.yaml", exchanged+"---\napiVersion: inlay.dev/v1alpha1\nkind: MeshService\nmetadata: {name: marker}\nspec: {ports: [{port: 1, protocol: TCP}]}\n")
	w.addressesOf("marker", 0) // the control plane has the new one
	w.progress(20)
	client, stranger := w.ask(w.client), w.ask(w.stranger)
	for name, c := range client.Probes {
		if c.failed() > 0 || c.OK == 0 {
			t.Errorf("without an agent: client: probe %s: %d of %d tries failed: %v", name, c.failed(), c.Tries, c.Errors)
		}
	}
	for name, c := range stranger.Probes {
		if c.OK > 0 {
			t.Errorf("without an agent: stranger: probe %s: %d of %d tries went well", name, c.OK, c.Tries)
		}
	}

	w.startNode(versionA).ready()
	took := w.eventually("the end of the long connection", func() bool { return w.ask(w.client).Probes["flow"].failed() > 0 })
	client, stranger = w.ask(w.client), w.ask(w.stranger)
	w.progress(20)
	later, heard := w.finish(w.client), w.finish(w.stranger)
	t.Logf("the new policy ended the connection %v after the agent was back", took.Round(time.Millisecond))
	// Calls that were under way at the first question may still count one.
	for _, name := range []string{"allowed", "flow"} {
		was, is := client.Probes[name], later.Probes[name]
		t.Logf("client: %s: %d tries, %d went well; then %d and %d: %v", name, was.Tries, was.OK, is.Tries-was.Tries, is.OK-was.OK, is.Errors)
		if is.OK > was.OK+1 || is.Tries < was.Tries+10 {
			t.Errorf("client: probe %s: %d of %d tries went well under the new policy", name, is.OK-was.OK, is.Tries-was.Tries)
		}
	}
	was, is := stranger.Probes["ingress"], heard.Probes["ingress"]
	t.Logf("stranger: ingress: then %d tries, of which %d went well: %v", is.Tries-was.Tries, is.OK-was.OK, is.Errors)
	if is.OK-was.OK < is.Tries-was.Tries-1 || is.OK == was.OK {
		t.Errorf("stranger: %d of %d tries went well under the new policy", is.OK-was.OK, is.Tries-was.Tries)
	}
	if c := heard.Probes["egress"]; c.OK > 0 {
		t.Errorf("stranger: %d tries to forbidden went well", c.OK)
	}
}
