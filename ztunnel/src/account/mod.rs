//! Each connection recorded once: counters and the access line.
