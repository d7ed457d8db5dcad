"""Work that nobody can vouch for, in small processes that are bounded in CPU time and memory."""
