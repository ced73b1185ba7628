//! Captured connections out.
