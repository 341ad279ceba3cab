package ads

// Backoff is the wait before attempt n.
var Backoff = backoff
