// Package tables turns what the control plane says (services, identities, policies) and what runs
// on this node into the contents of the maps that the programs read: it adds, changes, removes and
// prunes entries, each step in proportion to the change, and never lets a program see half of one.
//
// The agent calls it: Set what is wanted, Commit, and once the control plane's whole state has been
// set, Prune. A new Table reads what the maps hold, so that a restarted agent writes only what
// differs. Flow logs ask it for the names behind numbers.
//
// Model is the reference evaluator of network policies, written from what policies mean and not
// from how the maps hold them; tests compare it with the programs.
//
// The package never loads or attaches a program, never talks to the network, and starts no
// goroutine.
package tables
