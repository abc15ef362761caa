"""One small test for each public bug report of a peer, which shows that the bug does not happen here."""
