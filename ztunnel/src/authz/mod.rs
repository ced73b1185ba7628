//! Policies and a flow in, a permit or a refusal out; pure.
