//! Puts the eBPF object that `cargo xtask setup` built where the capture room embeds it from, and turns
//! `proto/` into Rust. It never builds the object itself (that takes another compiler), and a missing
//! one is an error.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

#[expect(
    clippy::disallowed_methods,
    reason = "a build script is configured by its environment"
)]
fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed=ZTUNNEL_EBPF_OBJECT");
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        println!("cargo::error=OUT_DIR is not set: run this by cargo");
        return ExitCode::FAILURE;
    };
    let object = env::var_os("ZTUNNEL_EBPF_OBJECT")
        .map(PathBuf::from)
        .or_else(|| target_dir(&out).map(|target| target.join("ebpf/ztunnel-ebpf.o")));
    let Some(object) = object else {
        println!("cargo::error=no target directory above {}", out.display());
        return ExitCode::FAILURE;
    };
    println!("cargo::rerun-if-changed={}", object.display());
    if let Err(error) = fs::copy(&object, out.join("ztunnel-ebpf.o")) {
        println!(
            "cargo::error=no eBPF object at {} ({error}); build it with: cargo xtask setup",
            object.display()
        );
        return ExitCode::FAILURE;
    }
    if let Err(error) = messages() {
        println!("cargo::error=proto: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// `.proto` to Rust, without `protoc`. Byte fields stay slices of the message that they came in.
fn messages() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = PROTOS.map(|name| format!("proto/{name}.proto"));
    let descriptors = protox::compile(files, ["proto"])?;
    prost_build::Config::new()
        .bytes(["."])
        .compile_fds(descriptors)?;
    Ok(())
}

const PROTOS: [&str; 5] = ["authorization", "citadel", "discovery", "workload", "zds"];

/// OUT_DIR is `<target>[/<triple>]/<profile>/build/<package>-<hash>/out`; the target directory is the
/// nearest ancestor that cargo has tagged as a cache.
fn target_dir(out: &Path) -> Option<PathBuf> {
    out.ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").exists())
        .map(Path::to_path_buf)
}
