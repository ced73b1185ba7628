//! Compiles the messages of the control plane and the node agent for the harness and, a folder deeper, for the
//! fuzz targets, from the same `.proto` files as the product.

use std::{path::Path, process::ExitCode};

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
    let proto = ["../ztunnel/proto", "../../ztunnel/proto"];
    let proto = proto.into_iter().find(|path| Path::new(path).is_dir());
    let proto = proto.ok_or("no ztunnel/proto beside this package")?;
    println!("cargo::rerun-if-changed={proto}");
    let files = ["authorization", "citadel", "discovery", "workload", "zds"]
        .map(|name| format!("{proto}/{name}.proto"));
    let descriptors = protox::compile(files, [proto])?;
    prost_build::Config::new()
        .bytes(["."])
        .compile_fds(descriptors)?;
    Ok(())
}
