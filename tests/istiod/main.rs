//! Node processes beside the real control plane: etcd, kube-apiserver and istiod run, node agents say which pods are
//! enrolled, objects are written through the API, and traffic says what became of them. Each effect is timed and
//! printed. Needs root and `cargo xtask setup --with controlplane`.
#![expect(
    clippy::disallowed_types,
    reason = "real time: nothing here runs on a paused clock"
)]
#![expect(clippy::print_stdout, reason = "each effect is measured and printed")]

mod asker;
mod churn;
mod credentials;
mod journey;
mod mtls;
mod on_demand;
mod outage;
mod policy;
mod world;
