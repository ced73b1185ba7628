//! Compiles the control plane's messages from the same `.proto` files as the product.

use std::process::ExitCode;

fn main() -> ExitCode {
    match messages() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error=proto: {error}");
            ExitCode::FAILURE
        }
    }
}

fn messages() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let files = ["authorization", "citadel", "discovery", "workload"]
        .map(|name| format!("{PROTO}/{name}.proto"));
    let descriptors = protox::compile(files, [PROTO])?;
    prost_build::Config::new()
        .bytes(["."])
        .compile_fds(descriptors)?;
    Ok(())
}

const PROTO: &str = "../../ztunnel/proto";
