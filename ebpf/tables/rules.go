package tables

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// rules number the rules of policies. A number follows from the rule itself, so that it is the
// same over every restart; of two rules with the same hash the second gets the next free number.
type rules struct {
	byNumber map[uint32]*numbered
	byRule   map[Rule]*numbered
	retired  []*numbered // without users, oldest first; still known to Rule
}

type numbered struct {
	Rule
	number uint32
	users  int // policy sets
}

// remembered is how many rules and identities without users are kept for records that come late.
const remembered = 4096

func (r *rules) init() {
	r.byNumber = make(map[uint32]*numbered)
	r.byRule = make(map[Rule]*numbered)
}

func hashRule(r Rule) uint32 {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %q %t %t", r.Policy, r.Name, r.Source, r.Direction, r.Deny, r.Audit))
	return binary.BigEndian.Uint32(sum[:])
}

// number gives every rule of a set its number.
func (r *rules) number(set *policySet) {
	for _, p := range set.policies {
		for _, list := range p.rules {
			for _, rule := range list {
				rule.number = r.acquire(rule.Rule)
			}
		}
	}
}

func (r *rules) acquire(rule Rule) uint32 {
	e := r.byRule[rule]
	if e == nil {
		n := hashRule(rule)
		for n == 0 || r.byNumber[n] != nil { // "0 for none"
			n++
		}
		e = &numbered{Rule: rule, number: n}
		r.byRule[rule] = e
		r.byNumber[n] = e
	}
	e.users++
	return e.number
}

// release takes back what number gave to a set; nil is none.
func (r *rules) release(set *policySet) {
	if set == nil {
		return
	}
	for _, p := range set.policies {
		for _, list := range p.rules {
			for _, rule := range list {
				e := r.byRule[rule.Rule]
				if e.users--; e.users == 0 {
					r.retired = append(r.retired, e)
				}
			}
		}
	}
	for len(r.retired) > remembered {
		e := r.retired[0]
		r.retired = r.retired[1:]
		if e.users == 0 && r.byRule[e.Rule] == e {
			delete(r.byRule, e.Rule)
			delete(r.byNumber, e.number)
		}
	}
}

func (r *rules) lookup(n uint32) (Rule, bool) {
	if e := r.byNumber[n]; e != nil {
		return e.Rule, true
	}
	return Rule{}, false
}
