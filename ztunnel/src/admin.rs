//! Readiness, metrics page.
