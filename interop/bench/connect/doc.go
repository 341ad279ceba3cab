// Package connect measures connect() through the node agent's programs beside connect() through
// iptables, legacy and nft, and beside connect() that nobody redirects: with 10 to 100,000 services
// each, all in one run and in rotated rounds, so that a machine whose speed drifts favours nobody.
//
// Every variant is a process of its own in a network namespace of its own, that connects to a
// listener of its own: to one service picked at random of all, since a list that is walked costs
// what its middle costs. It has tests only and needs root; `make bench` runs it with more rounds.
package connect
