//! Pods come and go.
