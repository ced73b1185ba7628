//! Memory per workload: builds meshes of growing size and reads the process's resident memory before and after. Idle
//! connections are scenario S9 of `cargo xtask bench`: they need a kernel and both ends.
#![expect(
    clippy::print_stdout,
    clippy::expect_used,
    reason = "a program that prints a table, and must not go on with a wrong mesh"
)]

mod mesh;

use std::{fs, hint::black_box};

use ztunnel::{authz::Policies, resolve::Snapshot};

/// As the node process does.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() {
    println!("workloads   bytes per workload (values and indexes)");
    for count in [1_000, 10_000, 100_000] {
        let before = resident_bytes();
        let snapshot = Snapshot::new("".into(), mesh::workloads(count), mesh::example(1).services);
        let bytes = resident_bytes() - before;
        println!("{count:>9}   {:.0}", bytes / f64::from(count));
        drop(black_box(snapshot));
    }
    let before = resident_bytes();
    let policies = Policies::new(mesh::policies(1_000));
    let bytes = resident_bytes() - before;
    println!("1000 policies: {:.0} bytes each", bytes / 1_000.0);
    drop(black_box(policies));
}

fn resident_bytes() -> f64 {
    let text = fs::read_to_string("/proc/self/statm").expect("/proc is there");
    let pages = text.split_whitespace().nth(1).expect("statm has columns");
    pages.parse::<f64>().expect("pages are a number") * 4096.0
}
