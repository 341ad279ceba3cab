package proxy

import "sync/atomic"

// counters are what Status tells; see there.
type counters struct {
	queries, answered, forwarded, refused, failed, shed, looped, malformed, beatsFailed atomic.Uint64
}

func (c *counters) fill(s *Status) {
	s.Queries, s.Answered, s.Forwarded, s.Refused = c.queries.Load(), c.answered.Load(), c.forwarded.Load(), c.refused.Load()
	s.Failed, s.Shed, s.Looped = c.failed.Load(), c.shed.Load(), c.looped.Load()
	s.Malformed, s.BeatsFailed = c.malformed.Load(), c.beatsFailed.Load()
}
