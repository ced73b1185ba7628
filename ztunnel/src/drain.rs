//! Graceful, then forced, with a deadline.
